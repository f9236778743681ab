"""Text to token ids and back.

tokenizer               Tokenizer, from the files of a folder or the metadata of a GGUF file
tokenizer_json          bounds on memory and time of a tokenizer.json
declared gpt2_files     the files beside tokenizer.json, and those of GPT-2
sentencepiece turns     tokenizers of GGUF files, and the ids that end a turn
templates sandbox       chat templates, rendered in a separate process
prompts chunks          ids of rendered messages; ids of long texts
"""
