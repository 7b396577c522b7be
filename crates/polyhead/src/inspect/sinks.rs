//! `polyhead inspect --sinks`: which channels of the residual stream make tokens sinks, and which tokens are, over which layers.

use polyhead_attention::StreamSite;
use polyhead_evaluation::sinks::{Kind, SinkRule, Sinks, channel_sizes, sink_channels, sinks, stream};
use polyhead_experiments::page::{escape, page, table};
use polyhead_models::intervention::visual_sinks::{EPS_PHI, phi};
use polyhead_recipe::Problems;
use polyhead_runs::{Failure, Trained};
use polyhead_training::run_folder::atomic_write;
use serde_json::{Value, json};

use super::InspectArgs;
use crate::console::{put, talk};
use crate::head_report::number;
use crate::probe::{folder, probe, word};

/// Among so many tokens the first sink is looked for, as published.
const CANDIDATES: usize = 3;

/// A token that is a sink in some layer.
struct Sink {
    text: usize,
    position: usize,
    word: String,
    kind: Kind,
    birth: usize,
    lifetime: usize,
}

/// Writes the tables.
pub fn inspect(args: &InspectArgs, trained: &Trained) -> Result<(), Failure> {
    if !(args.tau.is_finite() && args.tau > 0.0) {
        return Err(Problems::plain(format!("--tau ({}) must be above 0", args.tau)).into());
    }
    let rows = probe(trained, &args.text, args.rows)?;
    let (model, layers) = (&trained.model, trained.model.layers.len());
    let inputs: Vec<_> = rows.iter().map(|row| stream(model, &row.tokens, StreamSite::ResidPre)).collect();
    let sizes = channel_sizes(&inputs);
    let channels = sink_channels(&sizes, args.tau);
    let above = |layer: usize| {
        let tokens = inputs.iter().flat_map(|text| &text[layer]);
        tokens.filter(|token| phi(token, &channels, EPS_PHI) > args.tau).count()
    };
    let largest = |layer: usize| sizes[layer].iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    let line = |layer: usize| {
        let (channel, size) = largest(layer).unwrap_or_default();
        json!({ "layer": layer, "channel": channel, "size": size, "tokens_above": above(layer) })
    };
    let lines: Vec<Value> = (0..layers).map(line).collect();

    let word = |id: u32| word(trained, id);
    let mut found: Vec<Sink> = Vec::new();
    for (text, row) in rows.iter().enumerate() {
        let candidates: Vec<usize> = (0..CANDIDATES.min(row.seq)).collect();
        let outputs = stream(model, &row.tokens, StreamSite::ResidPost);
        let Sinks { lifetime, birth, kind, .. } = sinks(&outputs, &candidates, SinkRule::scaled(layers));
        let sink = |position: usize| {
            let (birth, word) = (birth[position]?, word(row.tokens[position]));
            Some(Sink { text, position, word, kind: kind[position], birth, lifetime: lifetime[position] })
        };
        found.extend((0..row.seq).filter_map(sink));
    }
    let count = |kind: Kind| found.iter().filter(|sink| sink.kind == kind).count();
    let told = format!(
        "{}. In {} there are {} primary and {} secondary sinks.",
        match &channels[..] {
            [] => {
                let (channel, size) =
                    (0..layers).filter_map(largest).max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
                format!(
                    "No channel is above {} at first tokens in most layers; the largest is {channel}, {size:.1}",
                    args.tau
                )
            }
            some => format!("Sink channels: {}", some.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
        },
        if rows.len() == 1 { "one text".to_owned() } else { format!("{} texts", rows.len()) },
        count(Kind::Primary),
        count(Kind::Secondary)
    );
    let told_sink = |sink: &Sink| {
        let Sink { text, position, word, kind, birth, lifetime } = sink;
        json!({ "text": text, "position": position, "token": word, "kind": kind, "birth": birth, "lifetime": lifetime })
    };
    let result = json!({
        "checkpoint": trained.path, "texts": rows.len(), "tau": args.tau, "channels": channels, "layers": lines,
        "sinks": found.iter().map(told_sink).collect::<Vec<_>>(),
    });
    let out = folder(args.out.as_deref(), &trained.path, "inspect")?;
    let [json_path, page_path] = ["sinks.json", "sinks.html"].map(|file| out.join(file));
    atomic_write(&json_path, format!("{result:#}\n").as_bytes())?;
    let title = format!("Sinks of {}", trained.path.display());
    atomic_write(&page_path, page(&title, &html(&title, &told, &lines, &found, args.tau)).as_bytes())?;
    put!("{:>5} {:>8} {:>10} {:>13}", "layer", "channel", "size", "tokens above")?;
    for line in &lines {
        let [layer, channel, tokens] = ["layer", "channel", "tokens_above"].map(|key| line[key].to_string());
        put!("{layer:>5} {channel:>8} {:>10} {tokens:>13}", number(line["size"].as_f64()))?;
    }
    talk!("\n{told}");
    talk!("numbers and page: {}, {}", json_path.display(), page_path.display());
    Ok(())
}

fn html(title: &str, told: &str, lines: &[Value], found: &[Sink], tau: f64) -> String {
    let layer = |line: &Value| {
        let [layer, channel, tokens] = ["layer", "channel", "tokens_above"].map(|key| line[key].to_string());
        vec![layer, channel, number(line["size"].as_f64()), tokens]
    };
    let sink = |sink: &Sink| {
        let Sink { text, position, word, kind, birth, lifetime } = sink;
        let kind = format!("{kind:?}").to_lowercase();
        vec![text.to_string(), position.to_string(), word.clone(), kind, birth.to_string(), lifetime.to_string()]
    };
    let layers = ["layer", "largest channel", "its size", "tokens above"].map(String::from);
    let tokens = ["text", "position", "token", "kind", "first layer", "layers"].map(String::from);
    let about = format!(
        "Size: a channel of the residual stream before a layer, by size over the root mean square of all channels, at first tokens (arXiv \
         2503.03321). Tokens above: those of all texts that are above {tau} by a sink channel. Sinks: tokens whose residual stream behind \
         layers is in the direction of the first sink (|cos| above 0.9), from its largest rise to its steepest fall: primary in nearly \
         all layers, secondary in some, noise in few."
    );
    format!(
        "<h1>{}</h1>\n<p class=\"finding\">{}</p>\n<h2>Channels</h2>\n{}<h2>Tokens</h2>\n{}<p class=\"quiet\">{}</p>\n",
        escape(title),
        escape(told),
        table(&layers, lines.iter().map(layer).collect()),
        table(&tokens, found.iter().map(sink).collect()),
        escape(&about)
    )
}
