//! `polyhead heads history`: which heads matter at each checkpoint of a run, which are new, and which no longer do (after arXiv
//! 2509.25758, whose heads are those of circuits; here they are those of the largest importance).

use std::collections::BTreeSet;
use std::path::PathBuf;

use burn::module::Module;
use clap::Args;
use polyhead_evaluation::ablation::{all_heads, loss_without, with_targets};
use polyhead_evaluation::head_sets::{HeadOf, Turnover, largest, random, turnover};
use polyhead_evaluation::heads::importances;
use polyhead_experiments::page::table;
use polyhead_models::Batch;
use polyhead_recipe::{ModelConfig, Problems};
use polyhead_runs::{Failure, Trained};
use polyhead_training::checkpoint::list;
use serde_json::{Value, json};

use super::decisions::{count_of, share};
use super::{mean, named};
use crate::console::{progress, talk};
use crate::head_report::{Report, number};
use crate::probe::{folder, open, probe};

/// Sets of random heads that losses are compared with; chosen by us.
const DRAWS: u64 = 3;

/// Which run.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// A run folder; checkpoint.keep_latest_k = 0 in its recipe keeps all checkpoints.
    run: PathBuf,
    /// What its heads are compared with. Default: the model that it started from (model.pretrained), else its first checkpoint.
    #[arg(long)]
    against: Option<PathBuf>,
    /// The share of heads that counts as those that matter, one at least.
    #[arg(long, default_value_t = 0.1, value_parser = share)]
    share: f64,
    /// Texts instead of held-out rows of the run's data.
    #[arg(long, num_args = 1.., value_parser = crate::cli::typed_text)]
    text: Vec<String>,
    /// Held-out rows at most.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "text")]
    rows: u32,
    /// Where the result is written. Default: a folder `heads` beside the run.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// A checkpoint, looked at.
struct Seen {
    name: String,
    step: u64,
    scores: Vec<(HeadOf, f64)>,
    set: BTreeSet<HeadOf>,
    /// Loss as it is; more without the heads of the set, and without as many random ones.
    loss: f64,
    without: f64,
    without_random: f64,
}

/// Writes the table.
pub fn history(args: &HistoryArgs) -> Result<(), Failure> {
    let open = |path: &PathBuf| open(path, args.device.as_deref());
    let checkpoints = list(&args.run)?;
    let Some((_, last)) = checkpoints.last() else {
        let problem = format!("{} has no checkpoints: name the folder of a run", args.run.display());
        return Err(Problems::plain(problem).into());
    };
    let trained = open(last)?;
    let rows = with_targets(&probe(&trained, &args.text, args.rows)?);
    if rows.is_empty() {
        return Err(Problems::plain("no row has anything to predict: more of them (--rows), or a --text".into()).into());
    }
    let heads = all_heads(&trained.model);
    let base = args.against.clone().or_else(|| started_from(&trained));
    let base = base.map(|path| ("base".to_owned(), 0, path));
    let steps = checkpoints.iter().map(|(step, path)| (step.to_string(), *step, path.clone()));
    let all: Vec<(String, u64, PathBuf)> = base.into_iter().chain(steps).collect();
    if all.len() < 2 {
        let problem = "there is one checkpoint alone: give what it is compared with (--against), or train with checkpoint.keep_latest_k = 0";
        return Err(Problems::plain(problem.into()).into());
    }
    let out = folder(args.out.as_deref(), &args.run, "heads")?;
    let count = count_of(args.share, heads.len());
    let mut seen = Vec::new();
    for (at, (name, step, path)) in all.iter().enumerate() {
        let trained = open(path)?;
        if all_heads(&trained.model) != heads {
            let problem =
                format!("{} has other heads than {}: they cannot be compared", path.display(), last.display());
            return Err(Problems::plain(problem).into());
        }
        seen.push(look(&trained, &rows, (name, *step), (&heads, count)));
        progress("looking at checkpoints", at as u64 + 1, all.len() as u64);
    }
    // What a set is compared with: sets of as many heads, drawn anew for each checkpoint.
    let sets: Vec<BTreeSet<HeadOf>> = seen.iter().map(|seen| seen.set.clone()).collect();
    let drawn: Vec<BTreeSet<HeadOf>> = (0..sets.len()).map(|at| random(&heads, count, at as u64)).collect();
    report(args, &heads, &seen, [&turnover(&sets), &turnover(&drawn)]).write(&out, "history")
}

/// The model that a run started from, where its recipe names one that is still there.
fn started_from(trained: &Trained) -> Option<PathBuf> {
    let Some(ModelConfig::Decoder { pretrained: Some(path), .. }) = trained.recipe.as_ref().map(|recipe| &recipe.model)
    else {
        return None;
    };
    if !path.exists() {
        talk!(
            "note: {} is not there any more, from which the run started: its first checkpoint is the base",
            path.display()
        );
    }
    path.exists().then(|| path.clone())
}

fn look(trained: &Trained, rows: &[Batch], (name, step): (&str, u64), (heads, count): (&[HeadOf], usize)) -> Seen {
    let model = &trained.model;
    let device = model.device().autodiff();
    let found = importances(&model.clone().fork(&device).train(), rows, &mut |_, _| {});
    let scores: Vec<(HeadOf, f64)> =
        heads.iter().map(|&(layer, head)| ((layer, head), f64::from(found[layer][head]))).collect();
    let set = largest(&scores, count);
    let loss = loss_without(model, rows, &[]);
    let more = |set: BTreeSet<HeadOf>| loss_without(model, rows, &set.into_iter().collect::<Vec<_>>()) - loss;
    let controls: Vec<f64> = (0..DRAWS).map(|seed| more(random(heads, count, seed))).collect();
    let without = more(set.clone());
    Seen { name: name.to_owned(), step, scores, set, loss, without, without_random: mean(&controls) }
}

fn report(args: &HistoryArgs, heads: &[HeadOf], seen: &[Seen], [own, drawn]: [&[Turnover]; 2]) -> Report {
    let names = |set: &BTreeSet<HeadOf>| set.iter().map(|&head| named(head)).collect::<Vec<_>>();
    let line = |((seen, own), drawn): ((&Seen, &Turnover), &Turnover)| {
        json!({ "checkpoint": seen.name, "step": seen.step, "loss": seen.loss, "heads": names(&seen.set),
            "births": names(&own.births), "deaths": names(&own.deaths), "jaccard_with_base": own.jaccard, "cohorts": own.cohorts,
            "loss_without_heads": seen.without, "loss_without_random_heads": seen.without_random,
            "random": { "births": drawn.births.len(), "deaths": drawn.deaths.len(), "jaccard_with_base": drawn.jaccard } })
    };
    let lines: Vec<Value> = seen.iter().zip(own).zip(drawn).map(line).collect();
    let cells = |((seen, own), drawn): ((&Seen, &Turnover), &Turnover)| {
        let counts =
            [own.births.len(), own.deaths.len(), drawn.births.len(), drawn.deaths.len()].map(|count| count.to_string());
        let shares =
            [own.jaccard, drawn.jaccard, seen.loss, seen.without, seen.without_random].map(|value| number(Some(value)));
        let cohorts = own.cohorts.iter().map(usize::to_string).collect::<Vec<_>>().join(" + ");
        [seen.name.clone()].into_iter().chain(counts).chain(shares).chain([cohorts]).collect()
    };
    let head = [
        "checkpoint",
        "births",
        "deaths",
        "births of random",
        "deaths of random",
        "Jaccard with base",
        "of random",
        "loss",
        "more without",
        "without random",
        "by first appearance",
    ];
    let rows = seen.iter().zip(own).zip(drawn).map(cells).collect();
    let body = format!("<h2>Checkpoints</h2>\n{}", table(&head.map(String::from), rows));
    let last = seen.len() - 1;
    let (first_seen, final_seen) = (&seen[0], &seen[last]);
    let born: BTreeSet<HeadOf> = final_seen.set.difference(&first_seen.set).copied().collect();
    let finding = format!(
        "Of the {} heads that matter most at {}, {} did not at {} (Jaccard {:.2}; of random heads {:.2}). Without them the loss is \
         {:+.3}, without as many random ones {:+.3}.",
        final_seen.set.len(),
        final_seen.name,
        born.len(),
        first_seen.name,
        own[last].jaccard,
        drawn[last].jaccard,
        final_seen.without,
        final_seen.without_random
    );
    let about = format!(
        "first, last: importance, |gate x gradient| (Michel et al. 2019, arXiv 1905.10650), in nats per target. times: in how many of {} \
         checkpoints the head is among the {} that matter most. By first appearance: how many of these were among them first at each \
         checkpoint so far (arXiv 2509.25758). Random: as many heads, drawn anew for each checkpoint; losses are means over {DRAWS} draws.",
        seen.len(),
        final_seen.set.len()
    );
    let column = |seen: &Seen| seen.scores.iter().map(|(_, score)| Some(*score)).collect::<Vec<_>>();
    let times = |head: &HeadOf| Some(seen.iter().filter(|seen| seen.set.contains(head)).count() as f64);
    let columns =
        vec![("first", column(first_seen)), ("last", column(final_seen)), ("times", heads.iter().map(times).collect())];
    let more = json!({ "run": args.run, "checkpoints": lines });
    let more = more.as_object().cloned().unwrap_or_default();
    let title = format!("Heads of {} over its checkpoints", args.run.display());
    Report { title, finding, about, heads: heads.to_vec(), columns, more, body }
}
