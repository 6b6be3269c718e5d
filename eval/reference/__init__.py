"""The frozen reference set: its documents, the windows scored of them, and the tokenizer's fingerprint.

`vernier prepare` writes it once; after that it is only read. Its two fingerprints decide what may be compared.
"""
