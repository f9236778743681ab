"""Text to token ids and back.

tokenizer               Tokenizer, from the files of a folder or the metadata of a GGUF file
tokenizer_json          what a tokenizer.json may ask of memory and time
declared gpt2_files     the files beside tokenizer.json, and GPT-2's in its place
sentencepiece turns     tokenizers of GGUF files, and the ids that end a turn
templates sandbox       chat templates, rendered in a process of their own
prompts chunks          ids of rendered messages; ids of long texts
"""
