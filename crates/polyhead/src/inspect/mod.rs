//! `polyhead inspect`: what the heads of a trained model look at, and how much each of them matters; of classifiers which
//! layers and features their gate lets through.

mod copying;
mod importance;
mod lens;
mod maps;
mod sinks;

use std::fmt::Write;
use std::path::PathBuf;

use burn::module::Module;
use clap::Args;
use polyhead_data::Tokenizer;
use polyhead_models::Batch;
use polyhead_models::intervention::visual_sinks::TAU;
use polyhead_training::image::{attention_grid, head_gates};
use polyhead_training::run_folder::atomic_write;

use crate::allowed::caller;
use crate::console::{progress, put, talk, wants_json};
use crate::head_report::{embedded, number as number_of, overview};
use crate::probe::{choose, folder, probe};
use polyhead_experiments::page::{escape, figure, page, table};
use polyhead_runs::Failure;
use polyhead_runs::classifier::open_classifier;
use polyhead_runs::open_trained;

use polyhead_evaluation::head_scores::Pattern;
use polyhead_evaluation::head_sets::HeadOf;
use polyhead_evaluation::heads::{self, Head, Layer};

/// What to look at.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint or a run folder.
    pub checkpoint: PathBuf,
    /// The text to look at; further ones count for what is averaged over texts. Default: held-out rows of the data that the model
    /// learned from.
    #[arg(long, num_args = 1.., value_parser = crate::cli::typed_text)]
    pub text: Vec<String>,
    /// Held-out rows that importance is averaged over.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "text")]
    pub rows: u32,
    /// Layers, counted from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    pub layers: Vec<usize>,
    /// Heads of each layer, counted from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    pub heads: Vec<usize>,
    /// Where maps and page are written. Default: a folder `inspect` beside the checkpoint.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Show instead what the weights of heads do with tokens, which of them copy and which suppress copies; of the strongest how much
    /// of their effect on the texts copy suppression explains.
    #[arg(long)]
    pub copying: bool,
    /// Tokens of the vocabulary that --copying looks at, spread evenly.
    #[arg(long, default_value_t = 256, value_parser = crate::cli::at_least_one, requires = "copying")]
    pub tokens: usize,
    /// Show instead the channels of the residual stream that make tokens attention sinks, and which tokens are, over which layers.
    #[arg(long, conflicts_with = "copying")]
    pub sinks: bool,
    /// What the size of a sink channel is above: 20 as published, for models of 4096 channels; it is never above √d_model.
    #[arg(long, default_value_t = TAU, requires = "sinks")]
    pub tau: f64,
    /// Show instead what makes the logit of a token at the end of each text: the residual stream read on its way (logit lens), and the
    /// part of the embedding, of each head and of each feed-forward layer, which add up to it (direct logit attribution).
    #[arg(long, conflicts_with_all = ["copying", "sinks"])]
    pub lens: bool,
    /// The token of --lens: the first of a text, or the id of one where the model has no tokenizer. Default: what comes next in rows of
    /// the data, and behind a --text what the model finds likeliest.
    #[arg(long, value_name = "TEXT", requires = "lens", value_parser = crate::cli::typed_text)]
    pub answer: Option<String>,
    /// Another token, whose logit is subtracted from that of --answer.
    #[arg(long, value_name = "TEXT", requires = "answer", value_parser = crate::cli::typed_text)]
    pub instead: Option<String>,
    /// A file of changes that are made to the model's forward on its way.
    #[arg(long, value_name = "FILE")]
    pub intervention: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Writes maps and a page, and prints the table of heads.
///
/// # Errors
/// If the model cannot be opened, or has no such layer or head.
pub fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    if let Some(classifier) = open_classifier(&args.checkpoint, args.device.as_deref(), caller())? {
        return importance::inspect(args, &classifier);
    }
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let trained = trained.intervened(args.intervention.as_deref())?.unguided(caller());
    if args.copying {
        return copying::inspect(args, trained);
    }
    if args.sinks {
        return sinks::inspect(args, &trained);
    }
    if args.lens {
        return lens::inspect(args, &trained);
    }
    let rows = probe(&trained, &args.text, args.rows)?;
    let device = trained.model.device().autodiff();
    let model = trained.model.clone().fork(&device).train();
    let layers = heads::observe_layers(&model, &rows, &mut |done, all| progress("importance of heads", done, all));
    let chosen = choose("--layers", &args.layers, layers.len())?;
    let out = folder(args.out.as_deref(), &trained.path, "inspect")?;

    let config = trained.model.config();
    let title = format!("Heads of {}", trained.path.display());
    let mut body = format!("<h1>{}</h1>\n<p class=\"finding\">{}</p>\n", escape(&title), escape(&summary(&layers)));
    let tokens = trained.tokenizer.as_ref().map_or_else(Vec::new, |tokenizer| maps::labels(tokenizer, &rows[0]));
    if let (Some(text), Some(tokenizer)) = (args.text.first(), &trained.tokenizer) {
        let words = tokens_in_words(tokenizer, &rows[0]);
        let _ = writeln!(
            body,
            "<p>{}</p><details><summary>Its {} tokens</summary><p>{words}</p></details>",
            escape(text),
            rows[0].seq
        );
    }
    let (mut figures, mut table_rows, mut all) = (String::new(), Vec::new(), Vec::new());
    for &at in &chosen {
        let layer = &layers[at];
        let heads = choose("--heads", &args.heads, layer.heads.len())?;
        let name = config.mechanism(at).name();
        for &head in &heads {
            table_rows.push(cells(at, name, head, &layer.heads[head]));
            all.push(((at, head), &layer.heads[head]));
        }
        if heads.is_empty() {
            continue;
        }
        let maps: Vec<Vec<f32>> = heads.iter().map(|&head| layer.maps[head].clone()).collect();
        let png = attention_grid(&maps, layer.length, layer.length).map_err(|error| Failure::Run(error.to_string()))?;
        let file = out.join(format!("maps-layer-{at:02}.png"));
        atomic_write(&file, &png.bytes)?;
        let image =
            maps::legend(&maps) + &maps::labelled(&png, &heads, &tokens, &format!("attention maps of layer {at}"));
        let numbers = layer.numbers.iter().map(|(row, values)| {
            let values: Vec<String> = values.iter().map(|value| format!("{value:.3}")).collect();
            format!("{} ({row}): {}", row.name.replace('_', " "), values.join(", "))
        });
        let list: Vec<String> = heads.iter().map(usize::to_string).collect();
        let small = format!("heads {} row by row. {}", list.join(", "), numbers.collect::<Vec<_>>().join("; "));
        figures.push_str(&figure(&format!("Layer {at}: {name}"), &small, &image));
        if let Some(gates) = &layer.gates {
            let png =
                head_gates(gates, layer.heads.len(), layer.length).map_err(|error| Failure::Run(error.to_string()))?;
            atomic_write(&out.join(format!("gates-layer-{at:02}.png")), &png.bytes)?;
            let image = embedded(&png, &format!("which heads the tokens chose in layer {at}"));
            let small = "one row per head, one column per token: the brighter, the more the head counts; dark where it is inactive";
            figures.push_str(&figure(&format!("Layer {at}: the heads that tokens chose"), small, &image));
        }
    }
    body.push_str(&overviews(&all)?);
    // Maps with labels are as wide as they need to be: one below the other.
    let column = if tokens.is_empty() { "" } else { " column" };
    let _ = write!(
        body,
        "<h2>Maps</h2>\n<p class=\"quiet\">Queries from top to bottom, keys from left to right; colours go with the square root of a \
         weight, the same in all maps of a layer; white is a weight of exactly 0. Below them is <a href=\"#heads\">a table of the heads</a>.\
         </p>\n<div class=\"figures{column}\">\n{figures}</div>\n<h2 id=\"heads\">Heads</h2>\n"
    );
    body.push_str(&table(&HEAD.map(String::from), table_rows.clone()));
    let _ = writeln!(
        body,
        "<p class=\"quiet\">Importance: |gate × gradient| of a gate of 1 on the head's output (Michel et al. 2019, arXiv \
         1905.10650), mean over {} rows, in nats per target. Distance: tokens back, weighted by the size of weights. Previous, duplicate, induction: the share of the \
         weights that is on the token before, on earlier occurrences of the same token, on what came behind those.</p>",
        rows.len()
    );
    atomic_write(&out.join("inspect.html"), page(&title, &body).as_bytes())?;
    let numbers = serde_json::Value::from_iter(chosen.iter().flat_map(|&at| as_json(at, &layers[at])));
    atomic_write(&out.join("inspect.json"), format!("{numbers:#}\n").as_bytes())?;

    let line = |cells: &[String]| {
        let widths = [5, 23, 4, 9, 10, 9, 11, 9, 10, 10].into_iter().zip(cells).enumerate();
        let cells = widths.map(|(at, (width, cell))| match at {
            1 => format!(" {cell:<0$}", width - 1),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join(" ")
    };
    match wants_json() {
        true => put!("{numbers:#}")?,
        false => {
            put!("{}", line(&HEAD.map(String::from)))?;
            table_rows.iter().try_for_each(|row| put!("{}", line(row)))?;
        }
    }
    talk!("\n{}", summary(&layers));
    talk!("maps and page: {}", out.join("inspect.html").display());
    Ok(())
}

/// What the table says of every head, to be seen at once.
fn overviews(all: &[(HeadOf, &Head)]) -> Result<String, Failure> {
    let heads: Vec<HeadOf> = all.iter().map(|(place, _)| *place).collect();
    let column = |of: &dyn Fn(&Head) -> Option<f32>| -> Vec<Option<f64>> {
        all.iter().map(|(_, head)| of(head).map(f64::from)).collect()
    };
    let mut columns = vec![
        ("importance".to_owned(), column(&|head| head.importance)),
        ("entropy".into(), column(&|head| head.entropy)),
        ("weight on the first key".into(), column(&|head| head.first_key)),
    ];
    for (at, pattern) in Pattern::ALL.iter().enumerate() {
        columns.push((pattern.name().replace('_', " "), column(&|head| Some(head.patterns[at]))));
    }
    let known = columns.iter().filter(|(_, values)| values.iter().any(Option::is_some));
    let figures = known.map(|(name, values)| overview(&heads, name, values)).collect::<Result<String, _>>()?;
    Ok(format!("<div class=\"figures small\">\n{figures}</div>\n"))
}

const HEAD: [&str; 10] = [
    "layer",
    "mechanism",
    "head",
    "entropy",
    "first key",
    "distance",
    "importance",
    "previous",
    "duplicate",
    "induction",
];

fn cells(layer: usize, mechanism: &str, at: usize, head: &Head) -> Vec<String> {
    let number = |value: Option<f32>| value.map_or("–".to_owned(), |value| format!("{value:.3}"));
    let importance = head.importance.map_or("–".to_owned(), |value| number_of(Some(value.into())));
    let [entropy, first_key, distance] = [head.entropy, head.first_key, Some(head.distance)].map(number);
    let patterns = head.patterns.map(|share| number(Some(share)));
    let own = [layer.to_string(), mechanism.to_owned(), at.to_string(), entropy, first_key, distance, importance];
    own.into_iter().chain(patterns).collect()
}

/// The heads of a layer as JSON.
fn as_json(layer: usize, seen: &Layer) -> impl Iterator<Item = serde_json::Value> {
    seen.heads.iter().enumerate().map(move |(head, of)| {
        let patterns = Pattern::ALL.iter().zip(of.patterns).map(|(pattern, share)| (pattern.name(), share.into()));
        let own = [("layer", layer.into()), ("head", head.into()), ("distance", of.distance.into())];
        let told = [("entropy", of.entropy), ("first_key", of.first_key), ("importance", of.importance)];
        let told = told.map(|(name, value)| (name, value.into()));
        let all = own.into_iter().chain(told).chain(patterns).map(|(name, value)| (name.to_owned(), value));
        serde_json::Value::Object(all.collect())
    })
}

/// Which heads matter, in words.
fn summary(layers: &[Layer]) -> String {
    let known = layers.iter().enumerate().flat_map(|(layer, seen)| {
        seen.heads.iter().enumerate().filter_map(move |(head, of)| Some((layer, head, of.importance?)))
    });
    let mut known: Vec<(usize, usize, f32)> = known.collect();
    known.sort_by(|a, b| b.2.total_cmp(&a.2));
    match known.as_slice() {
        [] => "No layer tells of its heads.".into(),
        [(layer, head, _)] => format!("One head: layer {layer}, head {head}."),
        [most, .., least] => {
            let all: f32 = known.iter().map(|(_, _, importance)| importance).sum();
            format!(
                "Of {} heads, head {} of layer {} matters most ({:.0} % of all importance), head {} of layer {} least ({:.1} %).",
                known.len(),
                most.1,
                most.0,
                100.0 * most.2 / all.max(1e-30),
                least.1,
                least.0,
                100.0 * least.2 / all.max(1e-30)
            )
        }
    }
}

fn tokens_in_words(tokenizer: &Tokenizer, row: &Batch) -> String {
    let mut words = String::new();
    for (at, &token) in row.tokens.iter().enumerate() {
        let _ = write!(words, "{at}&nbsp;<code>{}</code> ", escape(&tokenizer.decode(&[token])));
    }
    words
}
