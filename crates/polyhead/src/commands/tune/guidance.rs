//! `polyhead tune guidance`: heads whose maps, pulled to the identity, make predictions that are worth steering away from (SoftPAG).

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;
use polyhead_evaluation::head_sets::random;
use polyhead_models::intervention::answer_score::{AnswerScore, answer_score};
use polyhead_models::intervention::head_search::{FoundHeads, Guided, HeadSearch, heads_with_maps};
use polyhead_runs::Failure;
use polyhead_runs::intervention::write;
use serde_json::json;

use super::{MeasuredOn, about, head_line, line, plain, refuse};
use crate::cli::at_least_one;
use crate::console::{progress, put, talk};

/// Sets of random heads that those which were found are compared with; chosen by us.
const DRAWS: u64 = 5;

/// How heads are searched for.
#[derive(Debug, Args)]
pub struct GuidanceArgs {
    /// A checkpoint or a run folder.
    checkpoint: PathBuf,
    /// The intervention to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// How far predictions are steered away from those of the weak model; below 0 towards them, at -1 they are those.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    weight: f64,
    /// How far the maps of its heads are pulled to the identity, above 0 and up to 1.
    #[arg(long, default_value_t = 1.0)]
    pull: f64,
    /// Heads that are added in a round.
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    add: usize,
    /// Rounds at most; the search ends before where another one makes nothing better.
    #[arg(long, default_value_t = 3, value_parser = at_least_one)]
    rounds: usize,
    #[command(flatten)]
    on: MeasuredOn,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// Searches, and writes what was found.
pub fn guidance(args: &GuidanceArgs) -> Result<(), Failure> {
    let GuidanceArgs { weight, pull, add, rounds, .. } = *args;
    let rule = weight.is_finite() && weight != 0.0;
    refuse(rule, || format!("--weight ({weight}) must be a finite number other than 0, which changes nothing"))?;
    refuse(pull > 0.0 && pull <= 1.0, || format!("--pull ({pull}) must be above 0, up to 1"))?;
    let trained = plain(&args.checkpoint, args.device.as_deref(), &args.out)?;
    let (model, told) = (&trained.model, |error| about(&trained, &error));
    let all = heads_with_maps(model).map_err(told)?;
    let [calibration, others] = args.on.batches(&trained)?;
    let guided = Guided { weight, pull };
    let search = HeadSearch { batches: &calibration, by: args.on.by(), guided, add, rounds };
    let found = search.run(model, &mut |done, all| progress("searching heads", done, all)).map_err(told)?;
    write(&args.out, guided.by(&found.heads), &[])?;
    tell(&found);
    let mut result =
        json!({ "checkpoint": trained.path, "guided": guided, "batches": calibration.len(), "found": found });
    if !others.is_empty() {
        let score = |heads: &BTreeSet<(usize, usize)>| guided.score(model, &others, heads).map_err(told);
        let (before, after) = (answer_score(model, &others, &|_| Vec::new()), score(&found.heads)?);
        let drawn = (0..DRAWS).map(|seed| score(&random(&all, found.heads.len(), seed)));
        let control = mean(&drawn.collect::<Result<Vec<_>, _>>()?);
        line("other batches, without", &before);
        line("other batches, guided", &after);
        line("other batches, random heads", &control);
        result["other_batches"] = json!({ "plain": before, "guided": after, "random_heads": control });
    }
    talk!("wrote {}", args.out.display());
    put!("{result:#}")
}

fn tell(found: &FoundHeads) {
    head_line();
    line("without", &found.plain);
    for (number, round) in (1..).zip(&found.rounds) {
        let (layer, head) = round.each[0].0;
        let end = if round.taken { "" } else { " (not taken)" };
        line(&format!("round {number}: head {layer}.{head} best{end}"), &round.score);
    }
    talk!("{} heads", found.heads.len());
}

fn mean(scores: &[AnswerScore]) -> AnswerScore {
    let of = |number: fn(&AnswerScore) -> f64| scores.iter().map(number).sum::<f64>() / scores.len().max(1) as f64;
    AnswerScore { loss: of(|own| own.loss), accuracy: of(|own| own.accuracy), entropy: of(|own| own.entropy) }
}
