//! `polyhead heads patch`: which heads carry the answer, by putting in what they write after another prompt.

use burn::module::Module;
use clap::{Args, ValueEnum};
use polyhead_attention::{KvSite, Positions, QueryHead, QuerySite, Site, StreamSite};
use polyhead_evaluation::ablation::all_heads;
use polyhead_evaluation::head_importance::rank_correlation;
use polyhead_evaluation::head_sets::HeadOf;
use polyhead_evaluation::patching::{Receiver, Runs, effect, groups, z_gradients};
use polyhead_models::weights::held;
use polyhead_models::{Decoder, PromptPair};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use serde_json::json;

use super::repair::head;
use super::resume_log::ResumeLog;
use super::{OnPairs, Opened, mean, named, told_apart};
use crate::console::{progress, talk};
use crate::head_report::{Report, most};

/// Tokens of the prompts that are in memory at a time, roughly; chosen by us.
pub const TOKENS: usize = 512;

/// What is patched.
#[derive(Debug, Args)]
pub struct PatchArgs {
    #[command(flatten)]
    on: OnPairs,
    /// activation: a head's output itself; path: its effect by what the --receivers read, all other heads held; attribution: the
    /// first-order estimate, one backward pass for all heads.
    #[arg(long, value_enum, default_value_t = Method::Activation)]
    method: Method,
    /// Where heads are patched: all, last, or the number of a position from 0; negative ones count from the end. Of paths: last.
    #[arg(long, allow_hyphen_values = true, value_parser = position)]
    position: Option<At>,
    /// Receivers of paths: logits, or heads such as 3.1,4.0 (layer and head).
    #[arg(long, alias = "to", value_delimiter = ',', default_value = "logits", value_parser = receiver)]
    receivers: Vec<To>,
    /// What of the receiving heads, each counted from 0 among the query heads of its layer.
    #[arg(long, value_enum, default_value_t = Input::Q)]
    input: Input,
    /// Hold feed-forward layers as well, on the way of a path.
    #[arg(long)]
    freeze_mlps: bool,
}

/// How heads are patched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    Activation,
    Path,
    Attribution,
}

/// What a receiving head takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Input {
    /// Its queries.
    Q,
    /// The same after rotation.
    #[value(name = "rot_q")]
    RotQ,
    /// The keys that it reads.
    K,
    /// The same after rotation.
    #[value(name = "rot_k")]
    RotK,
    /// The values that it reads.
    V,
    /// Its output, counted as outputs are where some heads are subtracted from others.
    Z,
}

impl Input {
    fn site(self) -> Site {
        match self {
            Self::Q => QuerySite::Q.into(),
            Self::RotQ => QuerySite::RotQ.into(),
            Self::K => KvSite::K.into(),
            Self::RotK => KvSite::RotK.into(),
            Self::V => KvSite::V.into(),
            Self::Z => QuerySite::Z.into(),
        }
    }
}

/// A position of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    All,
    Only(i64),
}

fn position(text: &str) -> Result<At, String> {
    match text {
        "all" => Ok(At::All),
        "last" => Ok(At::Only(-1)),
        _ => text.parse().map(At::Only).map_err(|_| "must be all, last or a number".into()),
    }
}

impl At {
    /// The position in a prompt of so many tokens; `None` for all.
    fn of(self, seq: usize) -> Result<Option<usize>, Failure> {
        let Self::Only(at) = self else { return Ok(None) };
        let counted = if at < 0 { seq as i64 + at } else { at };
        match usize::try_from(counted).ok().filter(|&at| at < seq) {
            Some(at) => Ok(Some(at)),
            None => Err(Problems::plain(format!("--position: {at} is in no prompt of {seq} tokens")).into()),
        }
    }
}

/// A receiver as it is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    Logits,
    Head(usize, usize),
}

fn receiver(text: &str) -> Result<To, String> {
    if text == "logits" {
        return Ok(To::Logits);
    }
    let (layer, head) = head(text).map_err(|problem| format!("{problem}, or logits"))?;
    Ok(To::Head(layer, head))
}

impl PatchArgs {
    /// The receivers in a model.
    fn receivers(&self, model: &Decoder) -> Result<Vec<Receiver>, Failure> {
        let one = |to: &To| match *to {
            To::Logits => Ok(Receiver::Stream(model.layers.len() - 1, StreamSite::ResidPost)),
            To::Head(layer, head) => Receiver::of_head(model, layer, self.input.site(), head)
                .map_err(|problem| Problems::plain(format!("--receivers: {problem}")).into()),
        };
        self.receivers.iter().map(one).collect()
    }

    fn check(&self) -> Result<(), Failure> {
        let path = self.method == Method::Path;
        for (given, option) in [
            (self.receivers != [To::Logits], "--receivers"),
            (self.input != Input::Q, "--input"),
            (self.freeze_mlps, "--freeze-mlps"),
        ] {
            if given && !path {
                return Err(Problems::plain(format!("{option} is for --method path")).into());
            }
        }
        match self.position {
            Some(at) if path && at != At::Only(-1) => {
                Err(Problems::plain("--position: paths are patched at the last position alone".into()).into())
            }
            _ => Ok(()),
        }
    }
}

/// Patches every head.
pub fn patch(args: &PatchArgs) -> Result<(), Failure> {
    args.check()?;
    let Opened { trained, pairs, out } = args.on.open()?;
    let model = &trained.model;
    let groups = groups(&pairs, TOKENS);
    let usual = if args.method == Method::Path { At::Only(-1) } else { At::All };
    let at = args.position.unwrap_or(usual);
    for group in &groups {
        at.of(group[0].clean.len())?;
    }
    let receivers = args.receivers(model)?;
    let heads = all_heads(model);
    let mut found = Patched::new(&heads);
    if args.method != Method::Attribution {
        let options = format!("{:?} {at:?} {receivers:?} {}", args.method, args.freeze_mlps);
        let mut log = ResumeLog::open(&out, "patch.log.jsonl", &key(model, &pairs, &options))?;
        if log.len() > 0 {
            talk!("going on behind {} runs of before", log.len());
        }
        let one = |runs: &Runs, (layer, head): HeadOf| -> Result<Vec<f64>, Failure> {
            Ok(match args.method {
                Method::Path => runs.patch_path((layer, QueryHead(head)), &receivers, args.freeze_mlps),
                _ => {
                    let positions = at.of(runs.seq)?.map_or(Positions::All, Positions::only);
                    runs.patch_head(layer, QueryHead(head), positions)
                }
            })
        };
        run_groups(model, &groups, &mut found, &mut log, &one)?;
    }
    if args.method != Method::Path {
        attribute(model, &groups, at, &mut found)?;
    }
    report(args, &trained.path, &found, pairs.len())?.write(&out, "patch")
}

/// What the log of a command is about.
pub fn key(model: &Decoder, pairs: &[PromptPair], options: &str) -> String {
    let mut hash = blake3::Hasher::new();
    for parameter in held(model) {
        hash.update(parameter.name.as_bytes());
        parameter.values().iter().for_each(|value| _ = hash.update(&value.to_le_bytes()));
    }
    hash.update(format!("{pairs:?} {options}").as_bytes());
    hash.finalize().to_hex().to_string()
}

/// Differences of logits of all pairs.
pub struct Patched {
    heads: Vec<HeadOf>,
    /// Of clean and corrupt prompts.
    ends: [Vec<f64>; 2],
    /// Of each head.
    of_heads: Vec<Vec<f64>>,
    /// The estimates of what patching changes, sums over pairs.
    estimates: Vec<f64>,
}

impl Patched {
    /// Of no pairs yet.
    pub fn new(heads: &[HeadOf]) -> Self {
        let none = vec![Vec::new(); heads.len()];
        Self { heads: heads.to_vec(), ends: Default::default(), of_heads: none, estimates: Vec::new() }
    }

    /// The mean differences of clean and corrupt prompts.
    ///
    /// # Errors
    /// If they are the same, so that there is nothing to patch.
    pub fn ends(&self) -> Result<[f64; 2], Failure> {
        told_apart(self.ends.each_ref().map(|side| mean(side)))
    }

    /// The effect of each head, where it was patched.
    pub fn effects(&self) -> Result<Vec<Option<f64>>, Failure> {
        let ends = self.ends()?;
        Ok(self.of_heads.iter().map(|of| (!of.is_empty()).then(|| effect(mean(of), ends))).collect())
    }
}

/// Patches one head in one group: the difference of logits of each pair.
pub type PatchOne<'a> = dyn Fn(&Runs, HeadOf) -> Result<Vec<f64>, Failure> + 'a;

/// Patches every head in every group of pairs that the log does not know, and adds up all of them.
pub fn run_groups(
    model: &Decoder,
    groups: &[Vec<PromptPair>],
    found: &mut Patched,
    log: &mut ResumeLog,
    one: &PatchOne<'_>,
) -> Result<(), Failure> {
    let all = (groups.len() * found.heads.len()) as u64;
    for (number, group) in groups.iter().enumerate() {
        // Made where something is missing: a group that is done costs nothing.
        let mut runs: Option<Runs> = None;
        for side in 0..2 {
            let of = format!("{number}/{}", ["clean", "corrupt"][side]);
            let values = match log.get(&of) {
                Some(values) => values,
                None => {
                    let runs = runs.get_or_insert_with(|| Runs::new(model, group));
                    log.put(&of, runs.differences[side].clone())?
                }
            };
            found.ends[side].extend(values);
        }
        for (index, &head) in found.heads.iter().enumerate() {
            let of = format!("{number}/{}", named(head));
            let values = match log.get(&of) {
                Some(values) => values,
                None => {
                    let runs = runs.get_or_insert_with(|| Runs::new(model, group));
                    log.put(&of, one(runs, head)?)?
                }
            };
            found.of_heads[index].extend(values);
            progress("patching", (number * found.heads.len() + index + 1) as u64, all);
        }
    }
    Ok(())
}

/// Estimates what patching every head changes.
fn attribute(model: &Decoder, groups: &[Vec<PromptPair>], at: At, found: &mut Patched) -> Result<(), Failure> {
    let trained = model.clone().fork(&model.device().autodiff()).train();
    let fresh = found.ends[0].is_empty();
    found.estimates = vec![0.0; found.heads.len()];
    for (number, group) in groups.iter().enumerate() {
        let runs = Runs::new(model, group);
        if fresh {
            found.ends.iter_mut().zip(&runs.differences).for_each(|(end, own)| end.extend(own));
        }
        let scores = runs.attribution(&z_gradients(&trained, group), at.of(runs.seq)?).concat();
        // The gradient is that of the group's mean.
        found.estimates.iter_mut().zip(scores).for_each(|(sum, score)| *sum += score * group.len() as f64);
        progress("estimating", number as u64 + 1, groups.len() as u64);
    }
    Ok(())
}

fn report(args: &PatchArgs, path: &std::path::Path, found: &Patched, pairs: usize) -> Result<Report, Failure> {
    let [clean, corrupt] = found.ends()?;
    let mut columns = Vec::new();
    let effects = found.effects()?;
    let patched = effects.iter().any(Option::is_some);
    if patched {
        columns.push(("effect", effects.clone()));
    }
    let share = |sum: &f64| Some(sum / pairs as f64 / (corrupt - clean));
    let estimates: Vec<Option<f64>> = found.estimates.iter().map(share).collect();
    if !estimates.is_empty() {
        columns.push(("attribution", estimates.clone()));
    }
    let shown = if patched { &effects } else { &estimates };
    let mut finding = most(&found.heads, shown).map_or_else(String::new, |(head, effect)| {
        let what = if patched { "Patching" } else { "By its estimate, patching" };
        format!(
            "{what} head {} moves the answer most: {:.0} % of the way from clean to corrupt.",
            named(head),
            100.0 * effect
        )
    });
    let numbers = |values: &[Option<f64>]| values.iter().flatten().copied().collect::<Vec<f64>>();
    let correlation =
        (patched && !estimates.is_empty()).then(|| rank_correlation(&numbers(&effects), &numbers(&estimates)));
    if let Some(correlation) = correlation {
        finding += &format!(" The estimate orders heads alike with a rank correlation of {correlation:.2}.");
    }
    let method = format!("{:?}", args.method).to_lowercase();
    let more = json!({ "checkpoint": path, "pairs": pairs, "method": method, "difference_clean": clean,
        "difference_corrupt": corrupt, "rank_correlation": correlation });
    let about = format!(
        "Mean over {pairs} pairs of the difference of the logits of right and wrong: {clean:.3} after clean prompts, {corrupt:.3} \
         after corrupt ones. effect: (patched - clean) / (corrupt - clean). attribution: its first-order estimate, the change of a \
         head's output times the gradient (Nanda 2023), on the same scale."
    );
    let title = format!("Heads patched ({method}): {}", path.display());
    let more = more.as_object().cloned().unwrap_or_default();
    Ok(Report { title, finding, about, heads: found.heads.clone(), columns, more, body: String::new() })
}
