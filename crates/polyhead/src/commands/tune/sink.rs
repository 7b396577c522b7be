//! `polyhead tune sink`: heads whose attention to the first token is better scaled (ZeroTuning).

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use polyhead_models::intervention::sink_search::{Each, FoundSink, Profiled, SinkSearch, scored_heads, sink_score};
use polyhead_models::intervention::{AmountConfig, ChangeConfig, EditConfig, InterventionConfig, Span, SpanName};
use polyhead_runs::Failure;
use polyhead_runs::intervention::write;
use serde_json::json;

use super::{MeasuredOn, about, head_line, line, plain, refuse};
use crate::console::{progress, put, talk};

/// How the first token's share is tuned.
#[derive(Debug, Args)]
pub struct SinkArgs {
    /// A checkpoint or a run folder.
    checkpoint: PathBuf,
    /// The intervention to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    on: MeasuredOn,
    /// What is scaled alone at first: all heads of one index, or one head of one layer.
    #[arg(long, value_enum, default_value = "index")]
    each: EachName,
    /// Factors that are tried.
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.5, 0.75, 1.5, 2.0, 4.0], value_name = "FACTOR")]
    gammas: Vec<f64>,
    /// The factor that heads are scaled by alone, and its inverse.
    #[arg(long, default_value_t = 2.0)]
    probe: f64,
    /// The largest share of heads that are scaled.
    #[arg(long, default_value_t = 0.5)]
    share: f64,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// What is scaled alone.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum EachName {
    /// Heads of one index, in all layers.
    Index,
    /// One head of one layer.
    Head,
}

/// Tunes, and writes what was found.
pub fn sink(args: &SinkArgs) -> Result<(), Failure> {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    refuse(args.gammas.iter().all(|&gamma| positive(gamma)), || {
        format!("--gammas ({:?}) must be above 0", args.gammas)
    })?;
    refuse(args.probe.is_finite() && args.probe > 1.0, || format!("--probe ({}) must be above 1", args.probe))?;
    refuse(positive(args.share) && args.share <= 1.0, || format!("--share ({}) must be above 0, up to 1", args.share))?;
    let trained = plain(&args.checkpoint, args.device.as_deref(), &args.out)?;
    let model = &trained.model;
    let told = |error| about(&trained, &error);
    let sizes = scored_heads(model).map_err(told)?;
    let [calibration, others] = args.on.batches(&trained)?;
    let each = match args.each {
        EachName::Index => Each::Index,
        EachName::Head => Each::Head,
    };
    let (gammas, by, probe, share) = (&args.gammas[..], args.on.by(), args.probe, args.share);
    let search = SinkSearch { batches: &calibration, gammas, by, each, probe, share };
    let found = search.run(model, &mut |done, all| progress("tuning", done, all)).map_err(told)?;
    write(&args.out, sink_file(&found), &[])?;
    tell_sink(&found);
    let mut result = json!({ "checkpoint": trained.path, "batches": calibration.len(), "found": found });
    if !others.is_empty() {
        let score = |gamma: f64| {
            let found = FoundSink { gamma, ..found.clone() };
            sink_score(model, &others, &found.log_gamma(sizes, &model.device()))
        };
        let [before, after] = [1.0, found.gamma].map(score);
        line("other batches, without", &before);
        line(&format!("other batches, γ = {}", found.gamma), &after);
        result["other_batches"] = json!({ "plain": before, "tuned": after });
    }
    talk!("wrote {}", args.out.display());
    put!("{result:#}")
}

fn tell_sink(found: &FoundSink) {
    head_line();
    line("without", &found.plain);
    let chosen = found.profile.iter().filter(|own| own.chosen).count();
    found
        .sweep
        .iter()
        .for_each(|(gamma, score)| line(&format!("{chosen} of {}, γ = {gamma}", found.profile.len()), score));
    if found.gamma == 1.0 {
        talk!("note: no factor is better than none; the file changes nothing");
    }
}

/// Edits that scale the attention of the chosen heads to the first token: those of one layer are one edit.
fn sink_file(found: &FoundSink) -> InterventionConfig {
    let mut layers: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for Profiled { layer, head, .. } in found.profile.iter().filter(|own| own.chosen) {
        layers.entry(*layer).or_default().push(*head);
    }
    let edit = |(layer, heads): (Option<usize>, Vec<usize>)| EditConfig {
        layers: layer.map(|layer| vec![layer]),
        heads: Some(heads),
        keys: Span::Named(SpanName::First),
        ..EditConfig::new("scores", ChangeConfig::Add(AmountConfig::Number(found.gamma.ln())))
    };
    InterventionConfig { edits: layers.into_iter().map(edit).collect(), ..InterventionConfig::default() }
}
