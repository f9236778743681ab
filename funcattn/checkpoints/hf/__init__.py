"""The Hugging Face layout: config.json, safetensors, and adapters as PEFT writes them.

folder saving       a model read and written
compressed          quantized records of this library in safetensors
quantizers          the tool that quantized a file, recognized by its tensors
adapters            LoRA in PEFT's layout; peft_settings patterns: its adapter_config.json
"""
