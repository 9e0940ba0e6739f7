"""Language models of transformers: decoders, encoders, and both together."""

from __future__ import annotations

from collections.abc import Callable

from zoo.entry import (
    BOTH,
    CROSS_TOKENS,
    EAGER,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Entry,
    Inputs,
    Outcome,
    hugging_face,
    only_tokens,
    padded_tokens,
    padding,
    tokens,
)

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
DECODER = {**PLAIN, **SPECIAL, "num_key_value_heads": KV_HEADS, "use_cache": False}
WINDOW_THEN_FULL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def left_padded_tokens() -> Inputs:
    return {"input_ids": tokens(), "attention_mask": padding(left=5)}


def source_and_target() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=CROSS_TOKENS)}


def decoder(
    name: str,
    family: str,
    config: str = "",
    sites: int = LAYERS,
    implementations: tuple[str, ...] = BOTH,
    inputs: Callable[[], Inputs] = only_tokens,
    **settings: object,
) -> Entry:
    """A decoder whose configuration follows Llama's names."""
    merged = {**DECODER, **settings}
    return hugging_face(name, f"{family}ForCausalLM", config or f"{family}Config", merged, inputs, sites, implementations)


def causal(name: str, model: str, config: str, implementations: tuple[str, ...] = BOTH, **settings: object) -> Entry:
    """A decoder whose configuration has names of its own."""
    merged = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, **settings}
    return hugging_face(name, model, config, merged, only_tokens, implementations=implementations)


def falcon(name: str, **settings: object) -> Entry:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return causal(name, "FalconForCausalLM", "FalconConfig", **shape, **settings)


def encoder(
    name: str,
    family: str,
    implementations: tuple[str, ...] = BOTH,
    inputs: Callable[[], Inputs] = padded_tokens,
    outcome: Outcome = Outcome.FOUND,
    **settings: object,
) -> Entry:
    """An encoder whose configuration follows BERT's names."""
    merged = {**PLAIN, **settings}
    return hugging_face(name, f"{family}Model", f"{family}Config", merged, inputs, LAYERS, implementations, outcome)


LLAMA = decoder("llama", "Llama")
MISTRAL = decoder("mistral_sw", "Mistral", sliding_window=8)

T5 = hugging_face(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": HEAD_DIM,
        "d_ff": 96,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "use_cache": False,
        "decoder_start_token_id": 0,
    },
    source_and_target,
    sites=3 * LAYERS,
)

BART = hugging_face(
    "bart",
    "BartForConditionalGeneration",
    "BartConfig",
    {
        **SPECIAL,
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 64,
        "use_cache": False,
        "decoder_start_token_id": 1,
    },
    lambda: {**source_and_target(), "attention_mask": padding()},
    sites=3 * LAYERS,
)

DECODERS = (
    LLAMA,
    decoder("llama_pad", "Llama", inputs=left_padded_tokens),
    MISTRAL,
    decoder("qwen2", "Qwen2"),
    decoder("qwen2_sw", "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    decoder("qwen3", "Qwen3", head_dim=HEAD_DIM),
    decoder(
        "gemma2",
        "Gemma2",
        implementations=EAGER,
        head_dim=HEAD_DIM,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    decoder("gemma3", "Gemma3", "Gemma3TextConfig", head_dim=HEAD_DIM, query_pre_attn_scalar=16, **WINDOW_THEN_FULL),
    decoder(
        "gpt_oss",
        "GptOss",
        implementations=EAGER,
        head_dim=HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        **WINDOW_THEN_FULL,
    ),
    decoder("phi3", "Phi3", sliding_window=8),
    decoder("phi", "Phi"),
    decoder("stablelm", "StableLm", qk_layernorm=True),
    decoder("cohere", "Cohere", use_qk_norm=True),
    decoder("cohere2", "Cohere2", **WINDOW_THEN_FULL),
    decoder("olmo2", "Olmo2"),
    decoder("granite", "Granite", attention_multiplier=0.11),
    decoder("starcoder2", "Starcoder2", sliding_window=8),
    causal("gptneox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **PLAIN | SPECIAL),
    decoder("mixtral", "Mixtral", num_local_experts=4),
    decoder("nemotron", "Nemotron", head_dim=HEAD_DIM),
    decoder("glm4", "Glm4", head_dim=HEAD_DIM),
    decoder("diffllama", "DiffLlama", sites=2 * LAYERS, head_dim=HEAD_DIM),  # each layer subtracts one map from another
    decoder("smollm3", "SmolLM3"),
    decoder("exaone4", "Exaone4", sliding_window=8, sliding_window_pattern=2),
    decoder(
        "deepseek_v3",
        "DeepseekV3",
        num_key_value_heads=HEADS,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=12,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    decoder(
        "llama4",
        "Llama4",
        "Llama4TextConfig",
        sites=4,
        num_hidden_layers=4,
        intermediate_size=64,
        intermediate_size_mlp=64,
        head_dim=HEAD_DIM,
        num_local_experts=2,
        attention_chunk_size=8,
    ),
    causal("gpt2", "GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64),
    causal(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        EAGER,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
    ),
    causal(
        "gptj",
        "GPTJForCausalLM",
        "GPTJConfig",
        EAGER,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        rotary_dim=8,
    ),
    falcon("falcon_mqa", multi_query=True),
    falcon("falcon_alibi", multi_query=False, alibi=True),
    falcon("falcon_new", new_decoder_architecture=True, num_kv_heads=2),
    causal("bloom", "BloomForCausalLM", "BloomConfig", EAGER, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
    causal("mpt", "MptForCausalLM", "MptConfig", EAGER, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=64),
    causal(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=96,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
    ),
    decoder(
        "jamba",
        "Jamba",
        sites=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    decoder(
        "zamba2",
        "Zamba2",
        sites=1,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        hybrid_layer_ids=[1],
        num_key_value_heads=HEADS,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        num_mem_blocks=1,
        adapter_rank=4,
        chunk_size=8,
    ),
)

ENCODERS = (
    encoder("bert", "Bert"),
    encoder("bert_nomask", "Bert", inputs=only_tokens),
    encoder("roberta", "Roberta", max_position_embeddings=66),
    encoder("electra", "Electra", embedding_size=32),
    encoder("albert", "Albert", embedding_size=32),
    encoder(
        "modernbert",
        "ModernBert",
        local_attention=8,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
        **SPECIAL,
    ),
    encoder("esm", "Esm", position_embedding_type="rotary", pad_token_id=0, mask_token_id=4),
    encoder(
        "deberta_v2",
        "DebertaV2",
        EAGER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    encoder("deberta_v2_norel", "DebertaV2", EAGER),
    encoder("longformer", "Longformer", EAGER, outcome=Outcome.FRAGMENTS, attention_window=8, pad_token_id=1),
    encoder("big_bird_full", "BigBird", EAGER, attention_type="original_full"),
    encoder(
        "big_bird_sparse",
        "BigBird",
        EAGER,
        lambda: {"input_ids": tokens(1, 128)},
        Outcome.FRAGMENTS,
        max_position_embeddings=256,
        attention_type="block_sparse",
        block_size=8,
        num_random_blocks=2,
    ),
    encoder("megatron_bert", "MegatronBert", EAGER),
    encoder("roformer", "RoFormer", EAGER),
    encoder("mpnet", "MPNet", EAGER, max_position_embeddings=66),
    hugging_face(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": 96,
            "max_position_embeddings": 64,
        },
        padded_tokens,
    ),
    hugging_face(
        "xlnet",
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 96},
        padded_tokens,
        implementations=EAGER,
    ),
    hugging_face(
        "funnel",
        "FunnelBaseModel",
        "FunnelConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "block_sizes": [1, 1],
            "n_head": HEADS,
            "d_head": HEAD_DIM,
            "d_inner": 96,
            "num_decoder_layers": 1,
        },
        only_tokens,
        implementations=EAGER,
    ),
)

ENTRIES = (*DECODERS, *ENCODERS, T5, BART)
