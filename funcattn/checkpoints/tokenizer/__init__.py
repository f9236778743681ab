"""Text to token ids and back.

tokenizer               Tokenizer, from the files of a folder
tokenizer_json          bounds on memory and time of a tokenizer.json
declared                the files beside tokenizer.json
other_files             those of a folder without it: byte_level_files ranked sentencepiece_model
gguf_metadata           Tokenizer, from the metadata of a GGUF file
splits                  how text is cut before merges, by name
sentencepiece turns     the tokens of such files, and the ids that end a turn
conversations           messages and tools as chat templates read them
templates sandbox       chat templates, rendered in a separate process
prompts chunks          ids of rendered messages; ids of long texts
library                 errors of the tokenizers library
"""
