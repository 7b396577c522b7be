//! Which layers and features the gate of a classifier lets through: the Importance Factor of Gaussian adaptive attention.

use std::fmt::Write;

use polyhead_attention::Importance;
use polyhead_models::{ClassifierConfig, Matrix};
use polyhead_training::evaluate::evaluate;
use polyhead_training::image::matrix;
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use super::InspectArgs;
use crate::allowed::caller;
use crate::console::{put, talk, wants_json};
use crate::head_report::embedded;
use crate::probe::{choose, folder};
use polyhead_experiments::page::{escape, figure, page, table};
use polyhead_recipe::{ModelConfig, Problems};
use polyhead_runs::Failure;
use polyhead_runs::classifier::TrainedClassifier;
use polyhead_runs::data::{Source, Watched};

/// Writes the map and a page, and prints the table of layers, the most important first.
///
/// # Errors
/// If the model has no gate.
pub fn inspect(args: &InspectArgs, trained: &TrainedClassifier) -> Result<(), Failure> {
    if !args.text.is_empty()
        || !args.heads.is_empty()
        || args.intervention.is_some()
        || args.copying
        || args.sinks
        || args.lens
    {
        let problem = "--text, --heads, --copying, --sinks, --lens and --intervention are for decoders; of a classifier the layers that its gate lets through are shown";
        return Err(Problems::plain(problem.into()).into());
    }
    let labelled = trained.data()?;
    let sums = evaluate(&trained.model, &Watched::first(&Source(&labelled.validation), 0, caller()), 0)?;
    let Some(importance) = sums.importance() else {
        let problem = format!(
            "{} has no gate over layers: of classifiers, inspect shows the gates of gaussian_adaptive_transformer (gates \
             inside of transformer blocks are not shown)",
            trained.path.display()
        );
        return Err(Problems::plain(problem).into());
    };
    let shares = importance.shares();
    let read = match &trained.recipe.model {
        ModelConfig::Classifier { config: ClassifierConfig::GaussianAdaptiveTransformer(config), .. } => {
            config.layers.clone()
        }
        _ => None,
    };
    // Layers are called what they are called in the model whose features are read.
    let names = read.unwrap_or_else(|| (0..shares.len()).collect());
    let shown = choose("--layers", &args.layers, shares.len())?;
    let mut order = shown;
    order.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]));

    let out = folder(args.out.as_deref(), &trained.path, "inspect")?;
    let Importance { factor, features } = importance;
    let map = Matrix { rows: shares.len(), cols: features, values: factor };
    let png = matrix(&map).map_err(|error| Failure::Run(error.to_string()))?;
    atomic_write(&out.join("importance.png"), &png.bytes)?;

    let finding = finding(&names, &shares);
    let parts = parts(&names, &shares);
    let title = format!("Importance in {}", trained.path.display());
    let mut body = format!("<h1>{}</h1>\n<p class=\"finding\">{}</p>\n", escape(&title), escape(&finding));
    body.push_str("<div class=\"figures\">\n");
    let small = "one row per layer that is read, one column per feature: the brighter, the more of it passes the gate";
    body.push_str(&figure("Importance Factor", small, &embedded(&png, "importance of layers and features")));
    body.push_str("</div>\n<h2>Layers</h2>\n");
    let row = |at: &usize| vec![names[*at].to_string(), format!("{:.2}", 100.0 * shares[*at])];
    body.push_str(&table(&HEAD.map(String::from), order.iter().map(row).collect()));
    let _ = writeln!(
        body,
        "<p class=\"quiet\">IF = (DA - min DA) / (max DA - min DA), DA the mean gate over {} held-out examples (Ioannides et \
         al. 2024, arXiv 2401.11143). High is what is near the mean of its head's layers: what does not surprise, not what \
         is large.</p>",
        sums.examples()
    );
    atomic_write(&out.join("inspect.html"), page(&title, &body).as_bytes())?;

    match wants_json() {
        true => {
            let layers = order.iter().map(|&at| json!({ "layer": names[at], "share": shares[at] }));
            put!("{:#}", layers.collect::<Value>())?;
        }
        false => {
            put!("{:>5}  {:>9}", HEAD[0], HEAD[1])?;
            order.iter().try_for_each(|&at| put!("{:>5}  {:>9.2}", names[at], 100.0 * shares[at]))?;
        }
    }
    talk!("\n{finding} {parts}");
    talk!("map and page: {}", out.join("inspect.html").display());
    Ok(())
}

const HEAD: [&str; 2] = ["layer", "share (%)"];

/// Which layers matter, in words.
fn finding(names: &[usize], shares: &[f32]) -> String {
    if equal(shares) {
        return "All layers pass the same: that is so by construction where a gate runs along the features (axis = -1), whose \
                weights add up to one in every layer. Gates along the layers (paper, or axis = 1) tell layers apart."
            .into();
    }
    let order = order(shares);
    let (most, least) = (order[0], order[order.len() - 1]);
    format!(
        "Layer {} passes most ({:.1} % of all importance), layer {} least ({:.1} %).",
        names[most],
        100.0 * shares[most],
        names[least],
        100.0 * shares[least]
    )
}

/// What to type to train on the highest or the lowest third of the layers.
fn parts(names: &[usize], shares: &[f32]) -> String {
    if equal(shares) {
        return String::new();
    }
    let order = order(shares);
    let part = (order.len() / 3).max(1);
    let list = |chosen: &[usize]| {
        let mut chosen: Vec<usize> = chosen.iter().map(|&at| names[at]).collect();
        chosen.sort_unstable();
        chosen.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
    };
    let (high, low) = (list(&order[..part]), list(&order[order.len() - part..]));
    format!(
        "To train on a part: model.classifier.gaussian_adaptive_transformer.layers=[{high}] are the highest, [{low}] the lowest."
    )
}

/// Whether no layer stands out beyond rounding.
fn equal(shares: &[f32]) -> bool {
    let [low, high] = [f32::min, f32::max].map(|choose| shares.iter().copied().fold(shares[0], choose));
    shares.len() > 1 && high - low < 1e-4
}

/// Layers, the most important first.
fn order(shares: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_and_the_lowest_third_are_named_by_their_layers() {
        let (names, shares) = ([2, 5, 7, 9, 11, 30], [0.1, 0.4, 0.05, 0.2, 0.15, 0.1]);
        assert_eq!(finding(&names, &shares), "Layer 5 passes most (40.0 % of all importance), layer 7 least (5.0 %).");
        let text = parts(&names, &shares);
        assert!(text.contains("layers=[5,9] are the highest, [7,30] the lowest"), "{text}");
        let equal = [0.249999, 0.25, 0.25, 0.250001];
        assert!(
            finding(&[0, 1, 2, 3], &equal).starts_with("All layers pass the same")
                && parts(&[0, 1, 2, 3], &equal).is_empty()
        );
    }
}
