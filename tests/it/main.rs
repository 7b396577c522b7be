//! The project as its users see it: the binary, the recipes, the numbers of others.
#![allow(clippy::unwrap_used)]

mod accumulation;
#[cfg(any(feature = "ndarray", feature = "cuda"))]
mod backends;
mod classify;
mod cli;
mod compare;
mod convert;
mod docs;
mod faults;
mod features;
mod finetune;
mod foreign_models;
mod golden;
mod golden_dha;
mod golden_diff_v2;
mod golden_focusft;
mod golden_gaam;
mod golden_gated_attention;
mod golden_gated_delta_net;
mod golden_gda;
mod golden_hf;
mod golden_hilo;
mod golden_kdgqa;
mod golden_layer;
mod golden_mla;
mod golden_moh;
mod golden_optimizer;
mod golden_pooling;
mod golden_send;
mod golden_sink;
mod golden_sliding_window;
mod golden_spoilt;
mod growth;
mod hallucination;
#[cfg(feature = "download")]
mod hub;
mod layering;
mod lora;
mod matrix;
mod media;
mod neuron_dropout;
mod pages;
mod precision;
mod pretrained;
mod project;
mod resume;
mod serve;
mod signals;
mod sizes;
mod stages;
mod use_models;
mod world;
