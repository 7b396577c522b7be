//! Hugging Face's names for our weights.
