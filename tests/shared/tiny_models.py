"""The sizes of the models that trainers train in tests."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # distributions that are far from uniform
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
