"""The Hugging Face layout: config.json, safetensors, and adapters as PEFT writes them.

folder saving       a model read and written
compressed          quantized records of this library in safetensors
quantizers          the tool that quantized a file, recognized by its tensors
adapters saved_adapters    LoRA and DoRA in PEFT's layout, read and written
adapter_modules     the modules of the original, and the leaves that are rows of them
peft_settings patterns     adapter_config.json of PEFT
"""
