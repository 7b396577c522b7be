//! The rules about values of a recipe: each table's own, and those between tables.

use polyhead_attention::QuerySite;
use polyhead_data::synthetic::MadTask;
use polyhead_data::{DataConfig, Modality, Yields};
use polyhead_models::adapters::LoraConfig;
use polyhead_models::intervention::{InterventionConfig, SparseConfig};
use polyhead_models::weights::FrozenDtype;
use polyhead_models::{
    ActivationCheckpointing, ClassifierConfig, ConfigError, ContextMask, DecoderConfig, InputShape, LossConfig,
    Precision, broken, require,
};
use polyhead_training::config::{OnNonfinite, OptimizerConfig, ParallelMode};
use polyhead_training::neuron_dropout::{Mode, NO_EPOCHS, NeuronDropoutConfig, Select, Unit, weights_stay};
use polyhead_training::{AttentionShiftingConfig, FreezeConfig, ProcedureConfig};

use crate::nearest::nearest_name;
use crate::settings::{ModelConfig, Recipe};
use crate::{DEVICE_NAMES, parse_device};

/// Tokens of a batch at most: their places still are numbers that a tensor can hold. Chosen by us.
const MOST_TOKENS: usize = 1 << 30;

/// Every rule about values, with the key it is about.
pub fn validate(recipe: &Recipe) -> Vec<ConfigError> {
    let mut problems = Vec::new();
    let mut rule = |holds: bool, key: &str, message: String| {
        problems.extend(require(holds, key, || message).err());
    };
    let Recipe { model, training, validation, lr_scheduler, generation, .. } = recipe;
    let decoder = model.decoder();
    let is_classifier = matches!(model, ModelConfig::Classifier { .. });
    let yields = recipe.data.yields();
    for (own, fits, is, lacks) in [
        (
            Yields::Examples,
            is_classifier,
            "examples with classes, which model.classifier learns",
            "classes for model.classifier to learn",
        ),
        (
            Yields::Pairs,
            matches!(model, ModelConfig::Embedder(_)),
            "pairs that belong together, which model.embedder learns",
            "pairs for model.embedder to learn",
        ),
        (
            Yields::Images,
            matches!(model, ModelConfig::SuperResolution(_)),
            "images without classes, which model.super_resolution learns",
            "images without classes for model.super_resolution to learn",
        ),
    ] {
        let name = recipe.data.name();
        let message =
            if yields == own { format!("data.{name} is {is}") } else { format!("data.{name} has no {lacks}") };
        rule((yields == own) == fits, "data", message);
    }
    let reads_tokens = yields == Yields::Tokens || recipe.data.is_text();
    rule(
        reads_tokens || training.seq_len == 0,
        "training.seq_len",
        format!("training.seq_len ({}) has no meaning for data.{}: leave it out", training.seq_len, recipe.data.name()),
    );
    let at_least_one = |key: &str, value: u64| (value >= 1, format!("{key} ({value}) must be at least 1"));
    for (key, value) in [
        ("training.steps", training.steps),
        ("training.seq_len", if reads_tokens { training.seq_len as u64 } else { 1 }),
        ("training.batch_size", training.batch_size as u64),
        ("training.gradient_accumulation_steps", training.gradient_accumulation_steps as u64),
        ("metrics.log_freq", recipe.metrics.log_freq),
    ] {
        let (holds, message) = at_least_one(key, value);
        rule(holds, key, message);
    }
    // Sizes beyond these are typing mistakes, and would otherwise end as a failed allocation.
    for (key, value, most) in [
        ("training.seq_len", training.seq_len, 1 << 20),
        ("training.batch_size", training.batch_size, 1 << 16),
        ("training.gradient_accumulation_steps", training.gradient_accumulation_steps, 1 << 16),
        ("model.decoder.d_model", decoder.map_or(1, |decoder| decoder.d_model), 1 << 17),
        ("model.decoder.n_layers", decoder.map_or(1, |decoder| decoder.n_layers), 4096),
        ("model.decoder.d_ff", decoder.and_then(|decoder| decoder.d_ff).unwrap_or(1), 1 << 20),
    ] {
        rule(value <= most, key, format!("{key} ({value}) must be at most {most}"));
    }
    for (key, value, most) in [
        ("validation.batches", validation.batches, 1 << 24),
        ("generation.sampling.max_new_tokens", generation.sampling.max_new_tokens as u64, 1 << 24),
    ] {
        rule(value <= most, key, format!("{key} ({value}) must be at most {most}"));
    }
    let (rows, row) = (training.batch_size, training.seq_len.max(1));
    rule(
        rows.checked_mul(row).is_some_and(|all| all <= MOST_TOKENS),
        "training.batch_size",
        format!(
            "training.batch_size ({rows}) times training.seq_len ({row}) must be at most {MOST_TOKENS}: \
             training.gradient_accumulation_steps takes batches that are larger than memory one after the other"
        ),
    );
    let numbers = [
        ("training.max_norm", training.max_norm, 0.0, f64::MAX, "0 (off) or more"),
        ("training.dropout", training.dropout, 0.0, 0.99, "0 (off) to 0.99"),
        ("training.head_overlap", training.head_overlap, 0.0, 1e6, "0 (off) to 1e6"),
        ("training.penalty_weight", training.penalty_weight, 0.0, f64::MAX, "0 or more"),
        ("lr_scheduler.min_lr_ratio", lr_scheduler.min_lr_ratio, 0.0, 1.0, "0 to 1"),
        ("generation.sampling.temperature", generation.sampling.temperature, 0.0, 1e6, "0 (greedy) or more"),
        ("generation.sampling.top_p", generation.sampling.top_p, 1e-9, 1.0, "above 0, up to 1"),
        ("validation.fraction", validation.fraction, 1e-9, 0.5, "above 0, up to 0.5"),
    ];
    for (key, value, low, high, words) in numbers {
        rule((low..=high).contains(&value), key, format!("{key} ({value}) must be {words}"));
    }
    let optimizer: Vec<(&str, f64, f64, f64)> = match &recipe.optimizer {
        OptimizerConfig::Adamw(o) => vec![
            ("adamw.lr", o.lr, 0.0, 1e3),
            ("adamw.beta1", o.beta1, 0.0, 0.999_999_9),
            ("adamw.beta2", o.beta2, 0.0, 0.999_999_9),
            ("adamw.eps", o.eps, 0.0, 1.0),
            ("adamw.weight_decay", o.weight_decay, 0.0, 1e3),
        ],
        OptimizerConfig::Muon(o) => vec![
            ("muon.lr", o.lr, 0.0, 1e3),
            ("muon.momentum", o.momentum, 0.0, 0.999_999_9),
            ("muon.beta1", o.beta1, 0.0, 0.999_999_9),
            ("muon.beta2", o.beta2, 0.0, 0.999_999_9),
            ("muon.eps", o.eps, 0.0, 1.0),
            ("muon.weight_decay", o.weight_decay, 0.0, 1e3),
        ],
    };
    for (key, value, low, high) in optimizer {
        let key = format!("optimizer.{key}");
        rule((low..=high).contains(&value), &key, format!("{key} ({value}) must be {low} to {high}"));
    }
    rule(
        lr_scheduler.warmup_steps <= training.steps,
        "lr_scheduler.warmup_steps",
        format!(
            "lr_scheduler.warmup_steps ({warmup}) must not exceed training.steps ({}): set \
             lr_scheduler.warmup_steps={} too, or train for {warmup} steps or more",
            training.steps,
            training.steps / 10,
            warmup = lr_scheduler.warmup_steps
        ),
    );
    rule(
        parse_device(&training.device).is_ok(),
        "training.device",
        format!("training.device (\"{}\") must be one of {DEVICE_NAMES}", training.device),
    );
    let embedding = training.embedding_dropout;
    rule(
        embedding.is_none_or(|rate| (0.0..=0.99).contains(&rate) && matches!(model, ModelConfig::Decoder { .. })),
        "training.embedding_dropout",
        format!(
            "training.embedding_dropout ({}) must be 0 (off) to 0.99, and is for decoders",
            embedding.unwrap_or_default()
        ),
    );
    if training.head_overlap > 0.0 {
        let key = "training.head_overlap";
        rule(matches!(model, ModelConfig::Decoder { .. }), key, format!("{key} is for decoders"));
        let predicts =
            !matches!(recipe.procedure, ProcedureConfig::Boundaries(_) | ProcedureConfig::AttentionShifting(_));
        rule(
            predicts,
            key,
            format!(
                "{key} is added to the loss of predictions, which procedure.{} does not train on: leave it out",
                recipe.procedure.name()
            ),
        );
        rule(
            training.activation_checkpointing == ActivationCheckpointing::None,
            key,
            format!(
                "{key} reads the maps of all layers, which training.activation_checkpointing must leave there: \"none\""
            ),
        );
        let layers = decoder.map_or(0..0, |decoder| 0..decoder.n_layers);
        let without =
            layers.filter_map(|layer| decoder?.attention.of_layer(layer)?.absent(QuerySite::Weights.into())).next();
        rule(without.is_none(), key, format!("{key} takes maps of heads: {}", without.unwrap_or_default()));
    }
    if training.optimizer_in_backward {
        for (holds, words) in rules_of_optimizer_in_backward(recipe) {
            rule(holds, "training.optimizer_in_backward", words);
        }
    }
    rule(
        recipe.parallel.mode == ParallelMode::Data || recipe.parallel.is_default(),
        "parallel.mode",
        "parallel.optimizer_sharding, gradient_reduction and overlap are for parallel.mode = \"data\": set it, or leave them out"
            .into(),
    );
    let alone = match (&recipe.procedure, model) {
        (ProcedureConfig::Boundaries(_) | ProcedureConfig::AttentionShifting(_), _) => {
            Some(format!("procedure.{}", recipe.procedure.name()))
        }
        // It follows statistics of each pass.
        (_, ModelConfig::SuperResolution(_)) => Some("model.super_resolution".into()),
        _ => None,
    };
    rule(
        recipe.parallel.mode == ParallelMode::None || alone.is_none(),
        "parallel.mode",
        format!(
            "parallel.mode = \"data\" is for passes that do not depend on each other: {} trains on one rank",
            alone.unwrap_or_default()
        ),
    );
    let stop = validation.stop_accuracy;
    rule(
        stop.is_none_or(|accuracy| accuracy > 0.0 && accuracy <= 1.0),
        "validation.stop_accuracy",
        format!("validation.stop_accuracy ({}) must be above 0, up to 1", stop.unwrap_or_default()),
    );
    rule(
        (1..=1 << 40).contains(&lr_scheduler.hold_steps),
        "lr_scheduler.hold_steps",
        format!("lr_scheduler.hold_steps ({}) must be at least 1", lr_scheduler.hold_steps),
    );
    let (positions, longest) =
        (decoder.and_then(|decoder| decoder.learned_positions), recipe.data.source().longest_row(training.seq_len));
    rule(
        positions.is_none_or(|positions| longest <= positions),
        "model.decoder.learned_positions",
        format!(
            "model.decoder.learned_positions ({}) must be at least the tokens of the longest row of data.{}, {longest}",
            positions.unwrap_or_default(),
            recipe.data.name()
        ),
    );
    let compresses = matches!(&recipe.data, DataConfig::Mad(mad) if mad.task == MadTask::Compression);
    rule(
        decoder.is_none_or(|decoder| decoder.autoencoder == compresses),
        "model.decoder.autoencoder",
        "model.decoder.autoencoder belongs with data.mad.task = \"compression\", whose rows are their own targets, and with no \
         other data"
            .into(),
    );
    problems.extend(within("generation.sampling.diffusion", generation.sampling.diffusion.validate()));
    let plain = matches!(&recipe.procedure, ProcedureConfig::Standard(standard) if standard.context_mask == ContextMask::Causal);
    let diffuses = decoder.is_some_and(|decoder| decoder.masked_diffusion);
    problems.extend(
        require(!diffuses || plain, "procedure", || {
            "procedure: a masked diffusion model (model.decoder.masked_diffusion) is trained by procedure.standard, as it is".into()
        })
        .err(),
    );
    problems.extend(within("data", recipe.data.validate(training.seq_len)));
    let procedure = recipe.procedure.validate(decoder, training);
    problems.extend(procedure.into_iter().map(|error| error.within("procedure")));
    if let ProcedureConfig::NeuronDropout(config) = &recipe.procedure {
        problems.extend(validate_neuron_dropout(recipe, config));
    }
    if let ProcedureConfig::Boundaries(_) = recipe.procedure {
        for (key, set) in [("lora", recipe.lora.is_some()), ("intervention", recipe.intervention.is_some())] {
            let message = || {
                format!(
                    "{key}: procedure.boundaries trains a predictor beside a model that stays as it is: leave it out"
                )
            };
            problems.extend(require(!set, key, message).err());
        }
    }
    if let ProcedureConfig::AttentionShifting(config) = &recipe.procedure {
        problems.extend(validate_attention_shifting(recipe, config));
    }
    problems.extend(within("freeze", recipe.freeze.validate(model.n_layers().unwrap_or(usize::MAX))));
    problems.extend(
        require(
            model.pretrained_dtype() != FrozenDtype::Bf16 || recipe.keeps_weights(),
            "model.pretrained_dtype",
            || {
                "model.pretrained_dtype = \"bf16\" is for weights that stay as they are, and this recipe trains them in f32: add \
                 lora without train_whole, or leave it out"
                    .into()
            },
        )
        .err(),
    );
    let scaling = model.rope_scaling().map_or(Ok(()), |scaling| scaling.validate());
    problems.extend(within("model.rope_scaling", scaling));
    if let Some(mup) = model.mup() {
        problems.extend(within("model", mup.validate()));
        let message = "lora has pairs of its own, of which model.parametrization = \"mup\" knows no learning rate: leave one of them out";
        problems.extend(require(recipe.lora.is_none(), "lora", || message.into()).err());
    }
    if matches!(&recipe.data, DataConfig::Chat(chat) if chat.indicator.is_some()) {
        problems.extend(validate_indicator(recipe));
    }
    problems.extend(within("lora", recipe.lora.as_ref().map_or(Ok(()), LoraConfig::validate)));
    if let Some(intervention) = &recipe.intervention {
        problems.extend(within("intervention", intervention.validate(&nearest_name)));
        problems.extend(validate_trained(recipe, intervention));
    }
    if let Some(SparseConfig::Shifted(shifted)) = recipe.intervention.as_ref().and_then(|own| own.sparse.as_ref()) {
        let (seq, group) = (training.seq_len, shifted.shift(training.seq_len, 1).group);
        let whole = seq.is_multiple_of(group) && group.is_multiple_of(2);
        problems.extend(
            require(!shifted.leak || whole, "intervention.sparse.shifted.leak", || {
                format!("leak rolls the row by half a chunk: chunks ({group} tokens) must be even and divide training.seq_len ({seq})")
            })
            .err(),
        );
    }
    match model {
        ModelConfig::Embedder(embedder) => {
            problems.extend(validate_plain(recipe, "an embedder"));
            problems.extend(within("model.embedder", embedder.validate(None)));
        }
        ModelConfig::SuperResolution(config) => {
            problems.extend(validate_plain(recipe, "a network that enlarges images"));
            let size = match recipe.data.source().shape().filter(|_| problems.is_empty()) {
                Some(InputShape::Images { height, width, .. }) => Some([height, width]),
                _ => None,
            };
            problems.extend(within("model.super_resolution", config.validate(size)));
        }
        ModelConfig::Classifier { config: classifier, .. } => {
            let sound = problems.is_empty();
            problems.extend(validate_classifier(recipe, classifier, sound));
        }
        ModelConfig::Decoder { .. } => {}
    }
    if !is_classifier && (recipe.loss != LossConfig::default() || !recipe.augmentation.is_nothing()) {
        let key = if recipe.augmentation.is_nothing() { "loss" } else { "augmentation" };
        problems.push(ConfigError::new(key, format!("{key} is for model.classifier: leave it out")));
    }
    if problems.is_empty() {
        problems.extend(within("model.decoder", decoder.map_or(Ok(()), DecoderConfig::validate)));
    }
    if problems.is_empty()
        && model.pretrained().is_none()
        && recipe.lora.is_none()
        && let Some(decoder) = decoder
    {
        problems.extend(validate_patterns(&recipe.freeze, decoder));
    }
    problems
}

/// The error of a table's own rules, seen from the whole recipe.
fn within(table: &str, checked: Result<(), ConfigError>) -> Option<ConfigError> {
    checked.err().map(|error| error.within(table))
}

/// Whether all that is to be frozen exists. Where even the names are much work, the run finds out.
fn validate_patterns(freeze: &FreezeConfig, decoder: &DecoderConfig) -> Option<ConfigError> {
    if freeze.parameters.is_empty() {
        return None;
    }
    let names = decoder.parameter_names()?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    freeze.find(&names).err().map(|problem| ConfigError::new("freeze.parameters", problem))
}

/// What [procedure.neuron_dropout] asks of other tables.
fn validate_neuron_dropout(recipe: &Recipe, config: &NeuronDropoutConfig) -> Vec<ConfigError> {
    let mut problems = Vec::new();
    if config.unit == Unit::Epochs && recipe.data.is_endless() {
        problems.push(ConfigError::new("procedure.neuron_dropout.unit", NO_EPOCHS));
    }
    if let Some(decoder) = recipe.model.decoder() {
        let layer = config.layer_of(decoder.n_layers);
        let names = ["gate_proj", "up_proj", "down_proj"].map(|name| format!("layers.{layer}.mlp.{name}.weight"));
        let frozen = recipe.lora.is_some() || names.iter().any(|name| recipe.freeze.freezes(name));
        if frozen && config.mode == Mode::WeightsCompat && config.select != Select::None {
            problems.push(ConfigError::new("procedure.neuron_dropout.mode", weights_stay(layer)));
        }
    }
    problems
}

/// What [intervention.train] asks of other tables.
fn validate_trained(recipe: &Recipe, intervention: &InterventionConfig) -> Vec<ConfigError> {
    if intervention.train.is_empty() {
        return Vec::new();
    }
    let Recipe { lora, freeze, procedure, model, .. } = recipe;
    let alone = |key: &str| {
        format!(
            "{key} cannot stand beside intervention.train, which trains its own tensors alone: leave one of them out"
        )
    };
    broken([
        (lora.is_none(), "lora", alone("lora")),
        (*freeze == FreezeConfig::default(), "freeze", alone("freeze")),
        (model.mup().is_none(), "model.parametrization", alone("model.parametrization = \"mup\"")),
        (
            matches!(procedure, ProcedureConfig::Standard(_)),
            "procedure",
            format!("intervention.train is for procedure.standard, and the recipe has procedure.{}", procedure.name()),
        ),
    ])
}

/// What `data.chat.indicator` asks of other tables: that its token is trained.
fn validate_indicator(recipe: &Recipe) -> Vec<ConfigError> {
    let Recipe { lora, intervention, procedure, freeze, .. } = recipe;
    let rule = |trains: bool, key: &'static str| {
        let message = format!(
            "data.chat.indicator gives the model a new token, whose row {key} does not train: leave one of them out"
        );
        (trains, key, message)
    };
    broken([
        rule(lora.is_none(), "lora"),
        rule(intervention.as_ref().is_none_or(|own| own.train.is_empty()), "intervention.train"),
        rule(!matches!(procedure, ProcedureConfig::Boundaries(_)), "procedure.boundaries"),
        rule(!freeze.freezes("embedding.weight"), "freeze"),
    ])
}

/// What [procedure.attention_shifting] asks of other tables.
fn validate_attention_shifting(recipe: &Recipe, config: &AttentionShiftingConfig) -> Vec<ConfigError> {
    let Recipe { lora, model, training, .. } = recipe;
    let mut problems = broken([
        (
            model.pretrained().is_some(),
            "procedure.attention_shifting",
            "procedure.attention_shifting unlearns what a model has learnt: name one in model.pretrained".into(),
        ),
        (
            lora.as_ref().is_none_or(|lora| lora.train_whole.is_empty()),
            "lora.train_whole",
            "lora.train_whole changes the model that procedure.attention_shifting compares with: leave it out".into(),
        ),
        (
            training.activation_checkpointing == ActivationCheckpointing::None,
            "training.activation_checkpointing",
            "procedure.attention_shifting reads the maps of all layers, which training.activation_checkpointing must leave there: \
             \"none\""
                .into(),
        ),
    ]);
    let mut refuse = |key: &str, message: String| problems.push(ConfigError::new(key, message));
    if let Err(message) = AttentionShiftingConfig::check_targets(lora.as_ref().map(|lora| &*lora.targets)) {
        refuse(if lora.is_some() { "lora.targets" } else { "procedure.attention_shifting" }, message);
    }
    // What is wrong with the data itself is told already.
    let sound = recipe.data.validate(training.seq_len).is_ok();
    let sources = if sound { recipe.data.trained_sources() } else { Vec::new() };
    if sound && !sources.contains(&config.forget) {
        let there = match &sources[..] {
            [] => "there are no sources".to_owned(),
            some => format!("there are {}", some.join(", ")),
        };
        refuse(
            "procedure.attention_shifting.forget",
            format!(
                "procedure.attention_shifting.forget: the data has no source \"{}\" ({there}): data.facts has \"forget\" and \"retain\" \
                 where data.facts.forget is above 0, a mixture those of its [[data.source]] tables whose weight is above 0",
                config.forget
            ),
        );
    }
    problems
}

/// The rules of updating layers while the backward pass goes on.
fn rules_of_optimizer_in_backward(recipe: &Recipe) -> [(bool, String); 7] {
    let Recipe { procedure, training, model, parallel, .. } = recipe;
    let key = "training.optimizer_in_backward";
    [
        (matches!(model, ModelConfig::Decoder { .. }), format!("{key} is for decoders")),
        (
            matches!(procedure, ProcedureConfig::Standard(_)),
            format!("{key} is for procedure.standard: procedure.{} does more with gradients", procedure.name()),
        ),
        (
            training.max_norm == 0.0,
            format!(
                "{key} updates layers before the norm of all gradients is known, so that training.max_norm ({}) must be 0",
                training.max_norm
            ),
        ),
        (
            training.gradient_accumulation_steps == 1,
            format!(
                "{key} updates layers in every backward pass, so that training.gradient_accumulation_steps ({}) must be 1",
                training.gradient_accumulation_steps
            ),
        ),
        (
            training.on_nonfinite == OnNonfinite::Stop,
            format!(
                "{key} cannot leave a step out that has begun to update layers: training.on_nonfinite must be \"stop\""
            ),
        ),
        (
            training.precision == Precision::F32,
            format!(
                "{key} saves nothing where products read rounded copies of the weights, whose gradients come last: \
                 training.precision must be \"f32\""
            ),
        ),
        (parallel.mode == ParallelMode::None, format!("{key} is for one process: parallel.mode must be \"none\"")),
    ]
}

/// The rules of recipes for models that are no transformers and are trained in the plain way.
fn validate_plain(recipe: &Recipe, model: &str) -> Vec<ConfigError> {
    let Recipe { procedure, training, .. } = recipe;
    let rules = [
        (recipe.lora.is_none(), "lora", "lora is for decoders".to_owned()),
        (recipe.intervention.is_none(), "intervention", "intervention is for decoders".into()),
        (recipe.metrics.heads_interval == 0, "metrics.heads_interval", "metrics.heads_interval is for decoders".into()),
        (
            *procedure == ProcedureConfig::default(),
            "procedure",
            format!("procedure: {model} is trained by procedure.standard, as it is"),
        ),
        (
            training.dropout == 0.0,
            "training.dropout",
            format!("training.dropout is for transformers, which {model} is not"),
        ),
        (
            training.precision == Precision::F32,
            "training.precision",
            format!("training.precision must be \"f32\" for {model}"),
        ),
        (
            training.activation_checkpointing == ActivationCheckpointing::None,
            "training.activation_checkpointing",
            format!("training.activation_checkpointing must be \"none\" for {model}, which has no transformer layers"),
        ),
    ];
    broken(rules)
}

/// The rules of recipes for classifiers; where the rest is `sound`, those between the model and the shape of its data too.
fn validate_classifier(recipe: &Recipe, classifier: &ClassifierConfig, sound: bool) -> Vec<ConfigError> {
    let mut problems = Vec::new();
    let mut refuse = |holds: bool, key: &str, message: &str| {
        problems.extend(require(holds, key, || format!("{key} {message}")).err());
    };
    let Recipe { procedure, .. } = recipe;
    refuse(recipe.lora.is_none(), "lora", "is for decoders");
    refuse(recipe.intervention.is_none(), "intervention", "is for decoders");
    refuse(recipe.metrics.heads_interval == 0, "metrics.heads_interval", "is for decoders");
    let key = format!("procedure.{}", procedure.name());
    match procedure {
        ProcedureConfig::Standard(standard) => {
            let causal = standard.context_mask == ContextMask::Causal;
            refuse(
                causal,
                "procedure.standard.context_mask",
                "is about conversations, which a classifier does not learn",
            );
        }
        _ => refuse(false, &key, "is for decoders; a classifier is trained by procedure.standard"),
    }
    refuse(
        recipe.training.dropout == 0.0 || !matches!(classifier, ClassifierConfig::GaussianAdaptiveTransformer(_)),
        "training.dropout",
        "is for transformers, which a gaussian_adaptive_transformer's layers are not",
    );
    if let Err(words) = classifier.check_precision(recipe.training.precision) {
        refuse(false, "training.precision", &words);
    }
    if let Err(words) = classifier.check_checkpointing(recipe.training.activation_checkpointing) {
        refuse(false, "training.activation_checkpointing", &words);
    }
    refuse(
        recipe.augmentation.is_nothing() || matches!(recipe.data.modality(), Modality::Images | Modality::Audio),
        "augmentation",
        "is for images, and this data has none",
    );
    let still = recipe.augmentation.crop == 0 && !recipe.augmentation.flip;
    refuse(
        still || recipe.data.modality() != Modality::Audio,
        "augmentation",
        "of audio can only add noise: mirrored (flip) or moved (crop) it is other audio",
    );
    problems.extend(within("augmentation", recipe.augmentation.validate()));
    problems.extend(within("loss", recipe.loss.validate(None)));
    let shape = recipe.data.source().shape().filter(|_| sound && problems.is_empty());
    problems.extend(within("model.classifier", classifier.validate(shape)));
    problems
}
