//! What a conversion did: numbers on standard output and in `conversion.json`, images as files and for TensorBoard.

use std::path::Path;

use polyhead_attention::{Cache, HeadCounts, HeadSplit, Mask, Observe};
use polyhead_data::Loader;
use polyhead_models::surgery::{self, Cell, Heads};
use polyhead_models::{Batch, Decoder, Evaluated, ModelCosts};
use polyhead_training::image::{ImageError, Options, Png, attention_grid, heat_map};
use polyhead_training::run_folder::{atomic_write, files::CONVERSION};
use polyhead_training::tensorboard::EventWriter;
use serde_json::{Value, json};

use super::{batch_count, batches_of};
use crate::console::{Progress, put, thousands};
use polyhead_recipe::Conversion;
use polyhead_runs::Failure;

/// What held-out data says of a model and of what became of it.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Of the model.
    pub before: Evaluated,
    /// Of what became of it.
    pub after: Evaluated,
    /// Nats per target: how far its predictions are from the model's.
    pub divergence: f64,
    /// Bytes in f32 that decoding keeps per token, counted in a cache: before and after.
    pub cached: [u64; 2],
}

impl Measured {
    /// Measures a model and what became of it, each in one pass over the first batches; 0 takes all.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn on(models: [&Decoder; 2], loader: &Loader, batches: u64) -> Result<Self, Failure> {
        let [before, after] = models;
        let mut measured = Self {
            before: Evaluated::default(),
            after: Evaluated::default(),
            divergence: 0.0,
            cached: models.map(cached_bytes),
        };
        let (count, layers) = (batch_count(loader, batches), before.layers.len() as u64);
        let mut progress = Progress::new("loss before and after", count * 2 * layers);
        for batch in batches_of(loader, batches) {
            let batch = batch?;
            let compared = before.compare(after, &batch, &mut || progress.step(|at| pass_of(at, [2, layers, count])));
            for (which, sums) in [&mut measured.before, &mut measured.after].into_iter().enumerate() {
                let (loss, correct) = (compared.losses[which], compared.correct[which]);
                sums.add(Evaluated { loss, correct, targets: batch.target_tokens(), bytes: batch.target_bytes });
            }
            measured.divergence += compared.divergence;
        }
        let tokens = thousands(measured.before.targets);
        progress.finish(&format!("{count} of {} batches, {tokens} tokens", loader.batches_per_epoch()));
        for (sums, whose) in [(&measured.before, "the model"), (&measured.after, "what it would become")] {
            if !sums.mean_loss().is_finite() {
                return Err(Failure::Run(format!("the loss of {whose} is not finite ({})", sums.mean_loss())));
            }
        }
        measured.divergence /= measured.before.targets.max(1) as f64;
        if measured.divergence < 0.0 {
            // Predictions are the same, and rounding left it just below 0.
            measured.divergence = 0.0;
        }
        Ok(measured)
    }
}

/// The place of piece `at` (from 0) among layers of models that read batches.
pub fn pass_of(at: u64, [models, layers, batches]: [u64; 3]) -> String {
    let [model, layer] = [at / layers % models + 1, at % layers + 1];
    let which = if models > 1 { format!("model {model} of {models}, ") } else { String::new() };
    format!("batch {} of {batches}, {which}layer {layer} of {layers}", at / (layers * models) + 1)
}

/// Prints a table: before, after, and how heads are shared in each layer.
pub fn print(measured: &Measured, models: [&Decoder; 2], vocab_size: usize) -> Result<(), Failure> {
    let line = |name: &str, [before, after]: [String; 2]| put!("{name:<32} {before:>16} {after:>16}");
    let sums = [measured.before, measured.after];
    let cost = |of: fn(&ModelCosts) -> u64| {
        models.map(|model| thousands(of(&model.config().costs(vocab_size.max(model.vocab_size())))))
    };
    line("", ["before".into(), "after".into()])?;
    line("parameters", cost(|costs| costs.parameters))?;
    line("KV bytes per token, computed", cost(|costs| 4 * costs.kv_cache_elements_per_token))?;
    line("KV bytes per token, measured", measured.cached.map(thousands))?;
    line("loss", sums.map(|sums| format!("{:.4}", sums.mean_loss())))?;
    line("perplexity", sums.map(|sums| format!("{:.3}", sums.mean_loss().exp())))?;
    line("KL divergence from before, nats", ["0".into(), format!("{:.4e}", measured.divergence)])?;
    let shared: Vec<String> = head_counts(models[1]).into_iter().map(in_words).collect();
    let mut first = 0;
    for alike in shared.chunk_by(|a, b| a == b) {
        let last = first + alike.len() - 1;
        let layers = if first == last { format!("layer {first}") } else { format!("layers {first} to {last}") };
        put!("{layers:<16} {}", alike[0])?;
        first = last + 1;
    }
    Ok(())
}

/// How a layer's heads are divided.
fn in_words(shared: HeadCounts) -> String {
    match shared {
        HeadCounts::KeysAndValues([keys, values]) => format!("key heads {keys:<3} value heads {values}"),
        HeadCounts::QueriesOfEach(counts) => {
            let counts: Vec<String> = counts.iter().map(usize::to_string).collect();
            format!("query heads of its key/value heads: {}", counts.join(" "))
        }
        HeadCounts::Selected(HeadSplit { shared, routed, top_k }) => {
            format!("the first {shared} heads everywhere, {top_k} of the other {routed} at each position")
        }
    }
}

/// Bytes in f32 that decoding keeps per token, counted in a cache.
pub fn cached_bytes(model: &Decoder) -> u64 {
    let tokens = model.tokens(&Batch { batch: 1, seq: 1, tokens: vec![0], ..Default::default() });
    let mut cache = Cache::new(model.layers.len());
    model.forward(tokens, &Mask::causal(), Some(&mut cache), Observe::Nothing);
    cache.layers.iter().map(|layer| 4 * layer.elements() as u64).sum()
}

/// How the heads of each layer are divided, where the numbers say something.
fn head_counts(model: &Decoder) -> Vec<HeadCounts> {
    let config = model.config();
    (0..config.n_layers).filter_map(|layer| config.mechanism(layer).head_counts(layer)).collect()
}

/// Which of the parent's heads became shared ones and which are chosen; heads keep their order.
fn head_map(split: HeadSplit) -> serde_json::Value {
    let (shared, all) = (split.shared, split.heads());
    json!({ "shared": (0..shared).collect::<Vec<_>>(), "routed": (shared..all).collect::<Vec<_>>(), "top_k": split.top_k })
}

/// Writes `conversion.json`; gives what is in it.
pub fn summarize(
    out: &Path,
    conversion: &Conversion,
    [parent, child]: [&Decoder; 2],
    measured: &Measured,
) -> Result<Value, Failure> {
    let sums = |sums: &Evaluated| json!({ "loss": sums.mean_loss(), "bits_per_byte": sums.bits_per_byte() });
    let (mut allocation, mut heads) = (Vec::new(), Vec::new());
    for shared in head_counts(child) {
        match shared {
            HeadCounts::KeysAndValues(counts) => allocation.push(counts.to_vec()),
            HeadCounts::QueriesOfEach(counts) => allocation.push(counts),
            HeadCounts::Selected(split) => heads.push(head_map(split)),
        }
    }
    // Of a parent whose heads were being fused: how far apart they still are.
    let scatter = surgery::mean_scatter(parent);
    let summary = json!({
        "conversion": conversion,
        "before": sums(&measured.before), "after": sums(&measured.after), "divergence": measured.divergence,
        "scatter": scatter,
        "targets": measured.before.targets, "kv_bytes_per_token": measured.cached,
        "allocation": allocation, "heads": heads,
    });
    atomic_write(&out.join(CONVERSION), format!("{summary:#}\n").as_bytes())?;
    Ok(summary)
}

/// Images of how alike the parent's heads are and of what each layer was given.
pub fn draw(out: &Path, [parent, child]: [&Decoder; 2]) -> Result<(), Failure> {
    let mut album = Album { out, events: None };
    let n_layers = parent.config().n_layers;
    let mut progress = Progress::new("likeness of heads", (2 * n_layers * MEASURES.len()) as u64);
    for (cell, name) in [(Cell::Keys, "keys"), (Cell::Values, "values")] {
        let Ok(heads) = surgery::heads_of_layers(parent, cell) else { break }; // not softmax attention: nothing to show
        let n = heads.first().map_or(0, Heads::len);
        if heads.iter().any(|layer| layer.len() != n) {
            break;
        }
        for (measure, of) in MEASURES {
            let mut map = |(layer, heads): (usize, &Heads)| {
                let map = of(heads).into_iter().map(|value| value as f32).collect();
                progress.step(|_| format!("{measure} of {name}, layer {} of {n_layers}", layer + 1));
                map
            };
            let maps: Vec<Vec<f32>> = heads.iter().enumerate().map(&mut map).collect();
            album.add("similarity", &format!("{name}_{measure}"), attention_grid(&maps, n, n))?;
        }
    }
    let columns: Vec<Vec<usize>> = head_counts(child)
        .into_iter()
        .filter_map(|shared| match shared {
            HeadCounts::KeysAndValues(counts) => Some(counts.to_vec()),
            HeadCounts::QueriesOfEach(counts) => Some(counts),
            HeadCounts::Selected(_) => None,
        })
        .collect();
    let rows = columns.first().map_or(0, Vec::len);
    if rows > 0 && columns.iter().all(|column| column.len() == rows) {
        let values: Vec<f32> = (0..rows).flat_map(|row| columns.iter().map(move |column| column[row] as f32)).collect();
        let most = values.iter().copied().fold(1.0, f32::max);
        let options = Options { scale: CELL, range: Some((0.0, most)) };
        album.add("allocation", "heads", heat_map(&values, rows, columns.len(), &options))?;
        let names: Vec<String> = (0..rows).map(|row| row_name(child, row)).collect();
        let mut table = format!("| layer | {} |\n|{}\n", names.join(" | "), "---|".repeat(rows + 1));
        for (layer, column) in columns.iter().enumerate() {
            let cells: Vec<String> = column.iter().map(usize::to_string).collect();
            table.push_str(&format!("| {layer} | {} |\n", cells.join(" | ")));
        }
        album.text("allocation/heads", &table)?;
    }
    Ok(())
}

/// Pixels of a number in the image of the allocation; chosen by us.
const CELL: u32 = 24;

type Measure = fn(&Heads) -> Vec<f64>;
/// How alike two heads are.
const MEASURES: [(&str, Measure); 3] = [("cka", Heads::cka), ("cosine", Heads::cosine), ("distance", Heads::distance)];

fn row_name(child: &Decoder, row: usize) -> String {
    match (child.config().mechanism(0).head_counts(0), row) {
        (Some(HeadCounts::QueriesOfEach(_)), head) => format!("query heads of {head}"),
        (_, 0) => "key heads".into(),
        _ => "value heads".into(),
    }
}

/// Images in a run folder, as files and for TensorBoard.
struct Album<'a> {
    out: &'a Path,
    events: Option<EventWriter>,
}

impl Album<'_> {
    fn add(&mut self, folder: &str, name: &str, png: Result<Png, ImageError>) -> Result<(), Failure> {
        let png = png.map_err(failed)?;
        let path = self.out.join(folder);
        std::fs::create_dir_all(&path).map_err(|error| Failure::file("create", &path, error))?;
        atomic_write(&path.join(format!("{name}.png")), &png.bytes)?;
        let events = self.events()?;
        let tag = format!("{folder}/{name}");
        events.image_png(&tag, 0, png.width, png.height, &png.bytes).and_then(|()| events.flush()).map_err(failed)
    }

    /// A table in Markdown, for TensorBoard alone.
    fn text(&mut self, tag: &str, markdown: &str) -> Result<(), Failure> {
        let events = self.events()?;
        events.text(tag, 0, markdown).and_then(|()| events.flush()).map_err(failed)
    }

    fn events(&mut self) -> Result<&mut EventWriter, Failure> {
        let events = match self.events.take() {
            Some(events) => events,
            None => EventWriter::create(self.out, None).map_err(failed)?,
        };
        Ok(self.events.insert(events))
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Run(error.to_string())
}
