"""Our decoder as a model of transformers, with the same weights and logits."""

from __future__ import annotations

from ._transformers import transformers


def to_transformers(decoder, *, attention: str = "sdpa"):
    """A ``LlamaForCausalLM``, or a ``Qwen2ForCausalLM`` where queries, keys and values have biases.

    Args:
        decoder: a `corelib.models.decoder.Decoder`.
        attention: the attention implementation, such as ``"eager"`` or ``"corelib:exact"``.

    Returns:
        The model in evaluation mode, in the decoder's dtype. Its input embeddings are the output
        matrix times ``width ** 0.5``, as our decoder scales them, so they are no longer tied.
    """
    c = decoder.config
    family = "Qwen2" if c.qkv_bias else "Llama"
    config = getattr(transformers(), f"{family}Config")(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        max_position_embeddings=c.context,
        rms_norm_eps=decoder.norm.eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=False,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = getattr(transformers(), f"{family}ForCausalLM")(config).to(decoder.dtype)
    weights = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    tied = weights.pop("model.embed_tokens.weight")
    weights |= {"model.embed_tokens.weight": tied * c.width**0.5, "lm_head.weight": tied}
    model.load_state_dict(weights, strict=True)
    return model.eval()
