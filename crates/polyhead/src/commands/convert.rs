//! `polyhead convert`: a leaner model made of a trained one, compared with it and written as a checkpoint.
//!
//! A target is a variant of [`Target`] and an arm of [`make`].

use std::path::Path;

use clap::{Args, ValueEnum};
use polyhead_attention::{
    Attention, AttentionConfig, Cache, HeadSplit, LearnedRouterConfig, Mask, Observe, QueryNormConfig, RouterConfig,
};
use polyhead_data::{DataConfig, Loader, TextConfig, Tokenizer};
use polyhead_models::surgery::{self, Cell, Grouping, Pool, Routed, SurgeryError};
use polyhead_models::{Decoder, Evaluated, ModelCosts};
use polyhead_training::picture::attention_grid;
use polyhead_training::run_folder::atomic_write;
use polyhead_training::tensorboard::EventWriter;
use serde_json::json;

use super::must_not_exist;
use crate::assemble::{self, Trained};
use crate::console::{put, talk, thousands};
use crate::recipe::Recipe;
use crate::report::{Failure, Problems};

/// What a model is turned into, and how.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    pub checkpoint: std::path::PathBuf,
    /// What its attention becomes.
    #[arg(long)]
    pub to: Target,
    /// The run folder to write: `model.pretrained`, eval, generate and export take it.
    #[arg(long)]
    pub out: std::path::PathBuf,
    /// Key/value heads of every layer.
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// decoupled_head: the share of all key and value heads to keep, given to layers by the likeness of their heads.
    #[arg(long, conflicts_with = "kv_heads")]
    pub kv_budget: Option<f64>,
    /// How several heads become one; ward: the mean of heads that are alike, instead of neighbours.
    #[arg(long, default_value = "mean")]
    pub pool: PoolName,
    /// decoupled_head: fuse nothing yet; every head gets an operator that is the identity, for [procedure.fusion].
    #[arg(long)]
    pub fusing: bool,
    /// decoupled_head of a model that was being fused: the largest scatter at which groups may become single heads.
    #[arg(long, default_value_t = 1e-3)]
    pub scatter_limit: f64,
    /// mixture_of_head: heads that take part at every position, the first ones.
    #[arg(long)]
    pub shared: Option<usize>,
    /// mixture_of_head: of the other heads, those that take part at each position.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// mixture_of_head: who chooses them.
    #[arg(long, default_value = "query_norm")]
    pub router: RouterName,
    /// Compare on this text instead of the data that the model's recipe names.
    #[arg(long)]
    pub text: Vec<String>,
    /// Batches to compare on at most; 0 takes all that are held out.
    #[arg(long, default_value_t = 20)]
    pub batches: u64,
}

/// What attention becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Target {
    /// Fewer key/value heads, each shared by the same number of query heads.
    GroupedQuery,
    /// Numbers of their own of key heads and value heads in each layer; of a model being fused: its groups become heads.
    DecoupledHead,
    /// The same heads, of which some rest at each position.
    MixtureOfHead,
}

/// Who chooses the heads of a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum RouterName {
    /// The norms of the queries: no parameters, gates of 0 and 1.
    QueryNorm,
    /// Linear maps with fresh weights, which have to be trained.
    Learned,
}

impl RouterName {
    fn config(self) -> RouterConfig {
        match self {
            Self::QueryNorm => RouterConfig::QueryNorm(QueryNormConfig::default()),
            Self::Learned => RouterConfig::Learned(LearnedRouterConfig::default()),
        }
    }
}

/// How several heads become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum PoolName {
    /// The mean of neighbours.
    Mean,
    /// The first of neighbours.
    First,
    /// The mean of heads that are alike; keys and values are grouped apart, which makes the heads decoupled.
    Ward,
    /// The mean of neighbours, as long as they were on average.
    NormRestoring,
}

impl PoolName {
    fn pool(self) -> Pool {
        match self {
            Self::Mean | Self::Ward => Pool::Mean,
            Self::First => Pool::First,
            Self::NormRestoring => Pool::NormRestoring,
        }
    }
}

impl From<SurgeryError> for Failure {
    fn from(error: SurgeryError) -> Self {
        match error {
            SurgeryError::Refused(problem) => Problems::plain(problem).into(),
            SurgeryError::Weights(error) => error.into(),
        }
    }
}

/// Makes the model that was asked for.
fn make(args: &ConvertArgs, parent: &Decoder) -> Result<Decoder, Failure> {
    let needs = |what: &str| Failure::from(Problems::plain(format!("--to needs {what}")));
    match (args.to, args.pool) {
        (Target::GroupedQuery, PoolName::Ward) => {
            let kv_heads = args.kv_heads.ok_or_else(|| needs("--kv-heads N"))?;
            Ok(surgery::decouple(parent, Grouping::Ward(kv_heads), Pool::Mean)?)
        }
        (Target::GroupedQuery, pool) => {
            let kv_heads = args.kv_heads.ok_or_else(|| needs("--kv-heads N"))?;
            Ok(surgery::group_queries(parent, kv_heads, pool.pool())?)
        }
        (Target::MixtureOfHead, _) => {
            let (Some(shared_heads), Some(top_k)) = (args.shared, args.top_k) else {
                return Err(needs("--shared N and --top-k K"));
            };
            Ok(surgery::route_heads(parent, &Routed { shared_heads, top_k, router: args.router.config() })?)
        }
        (Target::DecoupledHead, pool) => {
            if let Some(scatter) = scatter(parent) {
                return collapse(parent, scatter, args.scatter_limit);
            }
            let grouping = match (args.kv_heads, args.kv_budget) {
                (Some(kv_heads), _) => Grouping::Ward(kv_heads),
                (None, Some(share)) => Grouping::Budget(share),
                (None, None) => return Err(needs("--kv-budget SHARE or --kv-heads N")),
            };
            match args.fusing {
                true => Ok(surgery::begin_fusion(parent, grouping)?),
                false => Ok(surgery::decouple(parent, grouping, pool.pool())?),
            }
        }
    }
}

/// The mean over cells of what is left to fuse; `None` where nothing is being fused.
fn scatter(model: &Decoder) -> Option<f64> {
    let cells: Vec<f64> = model
        .layers
        .iter()
        .filter_map(|layer| match &layer.attention {
            Attention::DecoupledHead(heads) => heads.scatter(),
            _ => None,
        })
        .flatten()
        .map(|cell| f64::from(cell.into_scalar::<f32>()))
        .collect();
    (!cells.is_empty()).then(|| cells.iter().sum::<f64>() / cells.len() as f64)
}

fn collapse(parent: &Decoder, scatter: f64, limit: f64) -> Result<Decoder, Failure> {
    if scatter > limit {
        return Err(Failure::Run(format!(
            "the scatter ({scatter:.2e}) is above --scatter-limit ({limit:.2e}): single heads would not do what their groups do. \
             Fuse for longer ([procedure.fusion], to the end of its steps), or raise the limit"
        )));
    }
    talk!("scatter: {scatter:.2e}");
    Ok(surgery::collapse(parent)?)
}

/// Converts a model, prints what that did, and writes it.
pub fn convert(args: &ConvertArgs) -> Result<(), Failure> {
    must_not_exist(&args.out)?;
    let parent = assemble::open_trained(&args.checkpoint, None)?;
    let recipe = recipe_for(args, &parent)?;
    // A fresh router's weights are a function of the recipe's seed.
    parent.model.device().seed(recipe.debug.seed);
    let child = make(args, &parent.model)?;
    let bytes_tokenizer = Tokenizer::bytes();
    let opened = assemble::data(&recipe, parent.tokenizer.as_ref().unwrap_or(&bytes_tokenizer), &mut |_, _| {})?;
    talk!("compared on: {}", opened.description);
    let measured = compare(&parent.model, &child, &opened.validation, args.batches)?;
    print(&measured, [&parent.model, &child], opened.vocab_size)?;

    let recipe = parent.recipe.clone().unwrap_or(recipe);
    let mut companions = vec![("data.json".to_owned(), assemble::data_record(&opened))];
    if let Some(tokenizer) = &parent.tokenizer {
        companions.push(("tokenizer.json".into(), tokenizer.to_json().as_bytes().to_vec()));
    }
    assemble::begin_run(&args.out, &child, recipe, companions)?;
    report(&args.out, &parent.model, &child, &measured)?;
    talk!("wrote {0}; next: model.pretrained = \"{0}\" in a recipe, or eval, generate, export", args.out.display());
    Ok(())
}

/// The recipe whose data both models are compared on.
fn recipe_for(args: &ConvertArgs, parent: &Trained) -> Result<Recipe, Failure> {
    let text = (!args.text.is_empty()).then(|| DataConfig::Text(TextConfig { paths: args.text.clone() }));
    let mut recipe = match (&parent.recipe, &text) {
        (Some(recipe), _) => recipe.clone(),
        (None, Some(_)) => {
            let seq_len = parent.max_positions.min(512);
            let minimal =
                format!("[model]\n[data.rust_docs]\n[training]\nsteps = 1\nseq_len = {seq_len}\nbatch_size = 4\n");
            toml::from_str(&minimal).map_err(|error| Failure::Run(error.to_string()))?
        }
        (None, None) => {
            let problem = format!("{} says nothing about data: name a text with --text", parent.path.display());
            return Err(Problems::plain(problem).into());
        }
    };
    if let Some(text) = text {
        if parent.tokenizer.is_none() {
            let problem = format!("--text: {} has no tokenizer", parent.path.display());
            return Err(Problems::plain(problem).into());
        }
        recipe.data = text;
    }
    Ok(recipe)
}

/// What held-out data says of both models.
struct Measured {
    before: Evaluated,
    after: Evaluated,
    /// Nats per target: how far the child's predictions are from the parent's.
    divergence: f64,
}

fn compare(parent: &Decoder, child: &Decoder, held_out: &Loader, batches: u64) -> Result<Measured, Failure> {
    let all = held_out.batches_per_epoch().max(1);
    let count = if batches == 0 { all } else { batches.min(all) };
    let mut measured = Measured { before: Evaluated::default(), after: Evaluated::default(), divergence: 0.0 };
    for position in 0..count {
        let batch = held_out.batch(position)?;
        measured.before.add(parent.evaluate(&batch));
        measured.after.add(child.evaluate(&batch));
        measured.divergence += parent.divergence(child, &batch);
    }
    measured.divergence /= measured.before.targets.max(1) as f64;
    Ok(measured)
}

fn print(measured: &Measured, models: [&Decoder; 2], vocab_size: usize) -> Result<(), Failure> {
    let line = |name: &str, [before, after]: [String; 2]| put!("{name:<32} {before:>16} {after:>16}");
    let sums = [measured.before, measured.after];
    let cost = |of: fn(&ModelCosts) -> u64| {
        models.map(|model| thousands(of(&model.config().costs(vocab_size.max(model.vocab_size())))))
    };
    line("", ["before".into(), "after".into()])?;
    line("parameters", cost(|costs| costs.parameters))?;
    line("KV bytes per token, computed", cost(|costs| 4 * costs.cached_numbers_per_token))?;
    line("KV bytes per token, measured", models.map(|model| thousands(cached_bytes(model))))?;
    line("loss", sums.map(|sums| format!("{:.4}", sums.mean_loss())))?;
    line("perplexity", sums.map(|sums| format!("{:.3}", sums.mean_loss().exp())))?;
    line("KL divergence from before, nats", ["0".into(), format!("{:.4e}", measured.divergence)])?;
    for (layer, [keys, values]) in allocation(models[1]).into_iter().enumerate() {
        put!("layer {layer:<3} key heads {keys:<3} value heads {values}")?;
    }
    for (layer, split) in splits(models[1]).into_iter().enumerate() {
        let HeadSplit { shared, routed, top_k } = split;
        put!("layer {layer:<3} the first {shared} heads everywhere, {top_k} of the other {routed} at each position")?;
    }
    Ok(())
}

/// Bytes in f32 that decoding keeps per token, counted in a cache.
fn cached_bytes(model: &Decoder) -> u64 {
    let tokens = model.tokens(&polyhead_models::Batch { batch: 1, seq: 1, tokens: vec![0], ..Default::default() });
    let mut cache = Cache::new(model.layers.len());
    model.forward(tokens, &Mask::causal(), Some(&mut cache), Observe::Nothing);
    cache.layers.iter().map(|layer| 4 * layer.numbers_per_token() as u64).sum()
}

/// Key heads and value heads of each layer, where they are what was converted.
fn allocation(model: &Decoder) -> Vec<[usize; 2]> {
    let config = model.config();
    let heads = |layer: usize| match config.mechanism(layer) {
        AttentionConfig::Softmax(softmax) => Some([softmax.kv_heads(); 2]),
        AttentionConfig::DecoupledHead(heads) => Some(heads.fused_heads()),
        _ => None,
    };
    (0..config.n_layers).filter_map(heads).collect()
}

/// How the heads of each layer are divided, where some of them rest.
fn splits(model: &Decoder) -> Vec<HeadSplit> {
    let config = model.config();
    let split = |layer: usize| match config.mechanism(layer) {
        AttentionConfig::MixtureOfHead(heads) => Some(heads.split(layer)),
        _ => None,
    };
    (0..config.n_layers).filter_map(split).collect()
}

/// Which of the parent's heads became shared ones and which are chosen; heads keep their order.
fn head_map(split: HeadSplit) -> serde_json::Value {
    let (shared, all) = (split.shared, split.heads());
    json!({ "shared": (0..shared).collect::<Vec<_>>(), "routed": (shared..all).collect::<Vec<_>>(), "top_k": split.top_k })
}

/// conversion.json, and pictures of how alike the parent's heads are, as files and for TensorBoard.
fn report(out: &Path, parent: &Decoder, child: &Decoder, measured: &Measured) -> Result<(), Failure> {
    let sums = |sums: &Evaluated| json!({ "loss": sums.mean_loss(), "bits_per_byte": sums.bits_per_byte() });
    let summary = json!({
        "before": sums(&measured.before), "after": sums(&measured.after), "divergence": measured.divergence,
        "targets": measured.before.targets, "kv_bytes_per_token": [cached_bytes(parent), cached_bytes(child)],
        "allocation": allocation(child), "heads": splits(child).into_iter().map(head_map).collect::<Vec<_>>(),
    });
    atomic_write(&out.join("conversion.json"), format!("{summary:#}\n").as_bytes())?;
    let layers = 0..parent.config().n_layers;
    let mut events = None;
    for (cell, name) in [(Cell::Keys, "keys"), (Cell::Values, "values")] {
        let heads: Result<Vec<_>, _> =
            layers.clone().map(|layer| surgery::heads_of_layer(parent, layer, cell)).collect();
        let Ok(heads) = heads else { return Ok(()) }; // not softmax attention: nothing to show
        let n = heads.first().map_or(0, surgery::Heads::len);
        if heads.iter().any(|layer| layer.len() != n) {
            return Ok(());
        }
        type Measure = fn(&surgery::Heads) -> Vec<f64>;
        let measures: [(&str, Measure); 3] =
            [("cka", surgery::Heads::cka), ("cosine", surgery::Heads::cosine), ("distance", surgery::Heads::distance)];
        for (measure, of) in measures {
            let maps: Vec<Vec<f32>> =
                heads.iter().map(|heads| of(heads).into_iter().map(|x| x as f32).collect()).collect();
            let png = attention_grid(&maps, n, n).map_err(|error| Failure::Run(error.to_string()))?;
            let folder = out.join("similarity");
            std::fs::create_dir_all(&folder).map_err(|error| Failure::file("create", &folder, error))?;
            atomic_write(&folder.join(format!("{name}_{measure}.png")), &png.bytes)?;
            let events = match &mut events {
                Some(events) => events,
                none => none.insert(EventWriter::create(out, None).map_err(|error| Failure::Run(error.to_string()))?),
            };
            let tag = format!("similarity/{name}_{measure}");
            let written = events.image_png(&tag, 0, png.width, png.height, &png.bytes).and_then(|()| events.flush());
            written.map_err(|error| Failure::Run(error.to_string()))?;
        }
    }
    Ok(())
}
