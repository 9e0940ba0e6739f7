"""Speech models of transformers."""

from __future__ import annotations

import torch

from zoo.entry import BATCH, CROSS_TOKENS, EAGER, HEADS, LAYERS, VOCABULARY, WIDTH, Inputs, hugging_face, tokens

WAVES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def sound() -> Inputs:
    return {"input_values": torch.randn(BATCH, 1000)}


def spectrogram_and_target() -> Inputs:
    return {"input_features": torch.randn(BATCH, 8, 60), "decoder_input_ids": tokens(length=CROSS_TOKENS)}


ENTRIES = (
    hugging_face("whisper", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, spectrogram_and_target, 3 * LAYERS),
    hugging_face("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", WAVES, sound),
    hugging_face(
        "wavlm",
        "WavLMModel",
        "WavLMConfig",
        {**WAVES, "num_buckets": 16, "max_bucket_distance": 30},
        sound,
        implementations=EAGER,
    ),
)
