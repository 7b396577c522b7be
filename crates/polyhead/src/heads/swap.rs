//! `polyhead heads swap`: one model with the maps of another, which tells how much of what it can do is in where its heads look.

use std::path::PathBuf;

use clap::Args;
use polyhead_evaluation::ablation::with_targets;
use polyhead_evaluation::next_token::Predictions;
use polyhead_evaluation::swap::{self, Maps, Swap};
use polyhead_experiments::page::{escape, page, table};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use super::decisions::share;
use crate::console::{progress, put, talk};
use crate::head_report::number;
use crate::probe::{choose, folder, open, probe};

/// Which models, on which texts.
#[derive(Debug, Args)]
pub struct SwapArgs {
    /// The model that reads with other maps: a checkpoint, a run folder, or a folder in Hugging Face's format.
    receiver: PathBuf,
    /// The model whose maps it reads with; it has as many layers, heads and ids.
    donor: PathBuf,
    /// Layers whose maps are swapped, each alone and all together, counted from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<usize>,
    /// Shares of the donor's map; the rest is the receiver's own.
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.5, 0.75, 1.0], value_parser = share, value_name = "SHARE")]
    shares: Vec<f64>,
    /// The texts. Default: held-out rows of the data that the receiver learned from.
    #[arg(long, num_args = 1..)]
    text: Vec<String>,
    /// Held-out rows at most.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "text")]
    rows: u32,
    /// Where the result is written. Default: a folder `heads` beside the receiver.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// Writes the table.
pub fn swap(args: &SwapArgs) -> Result<(), Failure> {
    let open = |path: &PathBuf| open(path, args.device.as_deref());
    let (receiver, donor) = (open(&args.receiver)?, open(&args.donor)?);
    let refuse = |problem: String| {
        let [receiver, donor] = [&receiver, &donor].map(|model| model.path.display());
        Problems::plain(format!("maps of {donor} do not fit {receiver}: {problem}"))
    };
    let layers = choose("--layers", &args.layers, receiver.model.layers.len())?;
    swap::check(&receiver.model, &donor.model, &layers).map_err(|error| refuse(error.problem))?;
    if let (Some(own), Some(other)) = (&receiver.tokenizer, &donor.tokenizer)
        && own.fingerprint() != other.fingerprint()
    {
        return Err(refuse("their tokenizers differ, so that one text is not the same ids".into()).into());
    }
    let rows = with_targets(&probe(&receiver, &args.text, args.rows)?);
    if rows.is_empty() {
        return Err(Problems::plain("no row has anything to predict: more of them (--rows), or a --text".into()).into());
    }
    let out = folder(args.out.as_deref(), &receiver.path, "heads")?;
    let swaps = all_swaps(&layers, &args.shares);
    let mut tell = |done, all| progress("swapping maps", done, all);
    let (plain, found) = swap::swap(&receiver.model, &donor.model, &rows, &swaps, &mut tell);

    let told = finding(&plain, &swaps, &found);
    let numbers = |found: &Option<Predictions>| found.map(|found| [found.loss, found.accuracy, found.kl]);
    let line = |(swap, found): (&Swap, &Option<Predictions>)| {
        let Swap { layers, maps, share } = swap;
        let [loss, accuracy, kl] = numbers(found).map_or([None; 3], |numbers| numbers.map(Some));
        json!({ "layers": layers, "maps": maps, "share": share, "loss": loss, "accuracy": accuracy, "kl": kl })
    };
    let lines: Vec<Value> = swaps.iter().zip(&found).map(line).collect();
    let result = json!({
        "receiver": receiver.path, "donor": donor.path, "rows": rows.len(), "loss": plain.loss, "accuracy": plain.accuracy,
        "swaps": lines,
    });
    let cells = |(swap, found): (&Swap, &Option<Predictions>)| -> Vec<String> {
        let place = [listed(&swap.layers), name(swap.maps).into(), swap.share.to_string()];
        let numbers = numbers(found).map_or([None; 3], |numbers| numbers.map(Some)).map(number);
        place.into_iter().chain(numbers).collect()
    };
    let head = ["layers", "maps", "share", "loss", "accuracy", "kl"].map(String::from);
    let rows_of_table: Vec<Vec<String>> = swaps.iter().zip(&found).map(cells).collect();
    let title = format!("Maps of {} in {}", donor.path.display(), receiver.path.display());
    let about = format!(
        "On {} texts the receiver has a loss of {:.4} nats per target and an accuracy of {:.1} %. It reads with (1 - share) of its own \
         map and share of another in all heads of the layers (after arXiv 2510.21866); kl: from its predictions as they are. Maps: the \
         donor's; its own, which change nothing; the donor's of another text; the donor's, each head with that of the head before.",
        rows.len(),
        plain.loss,
        100.0 * plain.accuracy
    );
    let body = format!(
        "<h1>{}</h1>\n<p class=\"finding\">{}</p>\n{}<p class=\"quiet\">{}</p>\n",
        escape(&title),
        escape(&told),
        table(&head, rows_of_table.clone()),
        escape(&about)
    );
    let [json_path, page_path] = ["swap.json", "swap.html"].map(|file| out.join(file));
    atomic_write(&json_path, format!("{result:#}\n").as_bytes())?;
    atomic_write(&page_path, page(&title, &body).as_bytes())?;
    for cells in [head.to_vec()].iter().chain(&rows_of_table) {
        put!("{}", cells.iter().map(|cell| format!("{cell:>11}")).collect::<Vec<_>>().join(" "))?;
    }
    talk!("\n{told}");
    talk!("numbers and page: {}, {}", json_path.display(), page_path.display());
    Ok(())
}

/// Of each layer alone, and of all of them together: the donor's maps by every share, and the controls whole.
fn all_swaps(layers: &[usize], shares: &[f64]) -> Vec<Swap> {
    let alone = layers.iter().map(|&layer| vec![layer]);
    let sets = alone.chain((layers.len() > 1).then(|| layers.to_vec()));
    let of_set = |layers: Vec<usize>| {
        let donors = shares.iter().map(|&share| (Maps::Donor, share));
        let controls = [Maps::Own, Maps::OtherText, Maps::OtherHead].map(|maps| (maps, 1.0));
        let all: Vec<(Maps, f64)> = donors.chain(controls).collect();
        all.into_iter().map(move |(maps, share)| Swap { layers: layers.clone(), maps, share })
    };
    sets.flat_map(of_set).collect()
}

fn name(maps: Maps) -> &'static str {
    match maps {
        Maps::Donor => "donor",
        Maps::Own => "own",
        Maps::OtherText => "other text",
        Maps::OtherHead => "other head",
    }
}

fn listed(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join("+")
}

/// What the largest share in all of the layers does, beside the controls.
fn finding(plain: &Predictions, swaps: &[Swap], found: &[Option<Predictions>]) -> String {
    let layers = swaps.last().map(|swap| listed(&swap.layers)).unwrap_or_default();
    let of = |maps: Maps| {
        let own = swaps.iter().zip(found).filter(|(swap, _)| swap.maps == maps && listed(&swap.layers) == layers);
        own.max_by(|a, b| a.0.share.total_cmp(&b.0.share)).and_then(|(swap, found)| Some((swap.share, (*found)?)))
    };
    let percent = |found: Option<(f64, Predictions)>| {
        found.map_or("not measured".into(), |(_, found)| format!("{:.1} %", 100.0 * found.accuracy))
    };
    let largest = of(Maps::Donor).map_or(0.0, |(share, _)| share);
    let null = of(Maps::Own).map_or(0.0, |(_, found)| found.kl.abs());
    let null = if null == 0.0 { "change nothing".into() } else { format!("move predictions by {null:.1e} nats") };
    format!(
        "With a share of {largest} of the donor's maps in layers {layers} accuracy goes from {:.1} % to {}; with its maps of another text \
         to {}, with those of the head before to {}. The receiver's own maps {null}.",
        100.0 * plain.accuracy,
        percent(of(Maps::Donor)),
        percent(of(Maps::OtherText)),
        percent(of(Maps::OtherHead))
    )
}
