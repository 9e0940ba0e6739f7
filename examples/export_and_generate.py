"""Export a language model with its caches, and generate text with the file in onnxruntime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM

import attn_compiler as attn
from attn_compiler.export import Decoder


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, sliding_window=16)).eval()
    prompt = np.arange(40)[None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mistral.onnx"
        report = attn.export_onnx(model, (torch.from_numpy(prompt),), path, decode=True)
        for name, what in report.caches.items():
            print(f"{name} holds {what}")
        text = Decoder(path).generate(prompt, 20)
    with torch.no_grad():
        expected = model.generate(torch.from_numpy(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None)
    print("generated:", *text[0, 40:])
    print("as torch does:", text.tolist() == expected.tolist())


if __name__ == "__main__":
    main()
