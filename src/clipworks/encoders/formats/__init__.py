"""Weight formats: how a file or folder of tensors becomes an encoder, and back.

`files` reads tensors safely (`safe` for safetensors, `archive` for torch's zip files) without knowing what
they mean; `openai`, `open_clip`, `huggingface` and `native` map names, configuration, preprocessing and
tokenizer.
"""
