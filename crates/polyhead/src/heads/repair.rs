//! `polyhead heads repair`: which parts make up for heads that are switched off.

use clap::Args;
use polyhead_attention::QueryHead;
use polyhead_evaluation::ablation::all_heads;
use polyhead_evaluation::copy_suppression::{Repair, self_repair};
use polyhead_evaluation::edges::Writer;
use polyhead_evaluation::head_sets::HeadOf;
use polyhead_evaluation::lens::Targets;
use polyhead_evaluation::patching::groups;
use polyhead_experiments::page::table;
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use serde_json::json;

use super::{OnPairs, Opened, named};
use crate::head_report::{Report, number};

/// Which heads, on which pairs.
#[derive(Debug, Args)]
pub struct RepairArgs {
    #[command(flatten)]
    on: OnPairs,
    /// The heads that are replaced by their means over clean prompts, such as 3.1,4.0 (layer and head).
    #[arg(long, value_delimiter = ',', required = true, value_parser = head)]
    off: Vec<HeadOf>,
}

/// Reads a head.
pub fn head(text: &str) -> Result<HeadOf, String> {
    let parts = text.split_once('.').and_then(|(layer, head)| Some((layer.parse().ok()?, head.parse().ok()?)));
    parts.ok_or_else(|| "must be a layer and a head such as 3.1".into())
}

/// Writes the table.
pub fn repair(args: &RepairArgs) -> Result<(), Failure> {
    let Opened { trained, pairs, out } = args.on.open()?;
    let all = all_heads(&trained.model);
    if let Some(&missing) = args.off.iter().find(|head| !all.contains(head)) {
        return Err(Problems::plain(format!("--off: the model has no head {}", named(missing))).into());
    }
    // Means are taken position by position.
    let groups = groups(&pairs, usize::MAX);
    let [pairs] = &groups[..] else {
        let problem = "heads are replaced by their means at each position: give prompts that are all of one length";
        return Err(Problems::plain(problem.into()).into());
    };
    if pairs.len() < 2 {
        return Err(Problems::plain("the mean over one pair is the head itself: give two or more pairs".into()).into());
    }
    let rows: Vec<Vec<u32>> = pairs.iter().map(|pair| pair.clean.clone()).collect();
    let [right, wrong]: [Vec<u32>; 2] =
        [pairs.iter().map(|pair| pair.right).collect(), pairs.iter().map(|pair| pair.wrong).collect()];
    let targets = Targets { rows: &rows, tokens: &right, minus: Some(&wrong) };
    let off: Vec<(usize, QueryHead)> = args.off.iter().map(|&(layer, head)| (layer, QueryHead(head))).collect();
    let found = self_repair(&trained.model, targets, &off);
    let called = |part: Writer| match part {
        Writer::Head(layer, head) => named((layer, head)),
        Writer::Mlp(layer) => format!("mlp {layer}"),
        Writer::Input => "input".into(),
    };
    let cells = |repair: &Repair| {
        let numbers = [repair.before, repair.after, repair.share].map(|value| number(Some(value)));
        [called(repair.part)].into_iter().chain(numbers).collect()
    };
    let head = ["part", "before", "after", "share"].map(String::from);
    let body = format!("<h2>Parts behind them</h2>\n{}", table(&head, found.iter().map(cells).collect()));
    let of_heads = found.iter().filter_map(|repair| match repair.part {
        Writer::Head(layer, head) => Some(((layer, head), repair)),
        _ => None,
    });
    let (heads, repairs): (Vec<HeadOf>, Vec<&Repair>) = of_heads.unzip();
    let column = |of: fn(&Repair) -> f64| repairs.iter().map(|repair| Some(of(repair))).collect::<Vec<_>>();
    let changed: f64 = found.iter().map(|repair| repair.after - repair.before).sum();
    let list: Vec<String> = args.off.iter().map(|&head| named(head)).collect();
    let finding = format!(
        "With {} replaced by the mean, the parts behind change their direct effect on the difference of logits by {changed:+.3}.",
        list.join(", ")
    );
    let about = format!(
        "Direct effects on the logit of right less that of wrong at the last position, mean over {} clean prompts, with the last norm's \
         scale as it is without changes; share: of the sum of all changes, feed-forward layers included.",
        rows.len()
    );
    let part = |repair: &Repair| json!({ "part": called(repair.part), "before": repair.before, "after": repair.after, "share": repair.share });
    let more = json!({ "checkpoint": trained.path, "off": list, "parts": found.iter().map(part).collect::<Vec<_>>() });
    let more = more.as_object().cloned().unwrap_or_default();
    let columns = vec![
        ("before", column(|repair| repair.before)),
        ("after", column(|repair| repair.after)),
        ("share", column(|repair| repair.share)),
    ];
    let title = format!("Self-repair: {}", trained.path.display());
    Report { title, finding, about, heads, columns, more, body }.write(&out, "repair")
}
