//! What a comparison found, in words.

use std::ops::Range;

use super::comparison::Matched;
use super::ladder::ArmLadder;
use super::metric::{METRICS, SECONDS};
use super::outcome::Outcome;
use super::verdict::{Compared, Verdict, shown_seeds};

/// Arms whose verdicts are told in one line; chosen by us.
const ONE_LINE: usize = 6;

impl Outcome {
    /// What was found, in words; a sentence for each setting.
    pub fn finding(&self) -> String {
        let (groups, compared) = (self.comparison.groups(), self.compared());
        let sentences = groups.into_iter().map(|(_, group)| self.finding_of(group, &compared));
        sentences.chain(self.laws_in_words()).collect::<Vec<_>>().join("\n")
    }

    /// The exponents of a ladder.
    fn laws_in_words(&self) -> Option<String> {
        let law = |ladder: ArmLadder| {
            let name = self.comparison.plain_name(ladder.arm).to_owned();
            let [low, high] = ladder.law.as_ref().map_or([0.0; 2], |law| law.interval);
            match ladder.law {
                Ok(law) => format!("{name} FLOPs^-{:.3} ({low:.3} to {high:.3})", law.exponent),
                Err(problem) => format!("{name} none ({problem})"),
            }
        };
        let laws: Vec<String> = self.ladders().into_iter().map(law).collect();
        (!laws.is_empty()).then(|| format!("Power laws over training FLOPs: {}.", laws.join("; ")))
    }

    fn finding_of(&self, group: Range<usize>, compared: &[Compared]) -> String {
        let metric = self.comparison.metric.metric();
        let first = self.comparison.base_of(group.start);
        let base = &self.arms[first].name;
        let Some(reached) = self.summary(first, metric) else {
            return format!(
                "No finished run of the base arm, {base}, has a {}: nothing to compare with.",
                metric.title
            );
        };
        let shown = |value: f64| format!("{:+.*}", metric.decimals, value * metric.factor);
        let (mut better, mut worse, mut uncorrected, mut equal, mut alone) = (vec![], vec![], vec![], vec![], vec![]);
        for found in compared.iter().filter(|found| group.contains(&found.arm)) {
            let name = self.comparison.plain_name(found.arm);
            let Some(difference) = found.difference else {
                alone.push(format!("{name} (no run to compare)"));
                continue;
            };
            let mean = shown(difference.mean);
            let interval = difference.interval().map(|(low, high)| format!("{} to {}", shown(low), shown(high)));
            let words = interval.map(|interval| format!("{name} ({mean}; {interval}; n = {})", difference.n));
            match found.verdict {
                Verdict::Better => better.extend(words),
                Verdict::Worse => worse.extend(words),
                Verdict::Uncorrected => uncorrected.extend(words),
                Verdict::Equal => equal.extend(words),
                Verdict::Unknown => alone.push(format!("{name} ({mean})")),
            }
        }
        let mut words = format!(
            "Against {base} ({} {}{}, n = {}): ",
            metric.title,
            metric.shown(reached.mean),
            space_before(metric.unit),
            reached.n
        );
        let mut parts = Vec::new();
        let among = format!("beyond chance alone, but not among {} comparisons (Holm)", compared.len());
        for (list, what) in [
            (better, "better beyond chance"),
            (worse, "worse beyond chance"),
            (uncorrected, &among),
            (equal, "no difference beyond chance"),
            (alone, "one seed or none, which tells nothing about chance"),
        ] {
            if !list.is_empty() {
                parts.push(format!("{what}: {}", list.join(", ")));
            }
        }
        // Of many arms, a line for each verdict.
        words.push_str(&parts.join(if group.len() > ONE_LINE { ";\n" } else { "; " }));
        words.push('.');
        words
    }

    /// What a reader should beware of.
    pub fn warnings(&self) -> Vec<String> {
        let edge = |arm: &super::outcome::ArmOutcome| {
            let name = arm.name.clone();
            arm.edges.iter().map(move |edge| format!("{name}: {edge}.")).collect::<Vec<_>>()
        };
        let off = self.times_off();
        let late = off.iter().filter(|(_, off)| off.abs() > self.comparison.tolerance());
        let late = late.map(|(arm, off)| {
            format!(
                "{}: its steps took {:+.1} % against the time of the base arm's, and {:.1} % are allowed: other work on the machine \
                 during the runs or the calibration does that.",
                self.arms[*arm].name,
                100.0 * off,
                100.0 * self.comparison.tolerance()
            )
        });
        let pairs = |found: &Compared| found.difference.is_some_and(|difference| difference.n == 2);
        let compared = self.compared();
        let of_two: Vec<&str> =
            compared.iter().filter(|found| pairs(found)).map(|found| self.arms[found.arm].name.as_str()).collect();
        let of_two = (!of_two.is_empty()).then(|| {
            format!(
                "Two seeds only: {}. Of as much spread, an interval from two is 3.6 times as wide as one from three, and hangs on the \
                 two being typical: take three seeds or more before you rely on any difference.",
                of_two.join(", ")
            )
        });
        of_two.into_iter().chain(self.arms.iter().flat_map(edge)).chain(late).collect()
    }

    /// By which share the steps of each arm took longer than those of its base, where the time was to be equal.
    pub fn times_off(&self) -> Vec<(usize, f64)> {
        let timed = self.comparison.matched == Matched::Time;
        let pairs = self.pairs(0..if timed { self.arms.len() } else { 0 });
        let seconds = |arm: usize| Some(self.summary(arm, &METRICS[SECONDS])?.mean);
        pairs.filter_map(|(arm, base)| Some((arm, seconds(arm)? / seconds(base)? - 1.0))).collect()
    }

    /// How many seeds would tell the differences from chance that these seeds cannot; `None` where there are none.
    pub fn power_note(&self) -> Option<String> {
        let open = |found: &&Compared| matches!(found.verdict, Verdict::Equal | Verdict::Uncorrected);
        let compared = self.compared();
        let needed = compared.iter().filter(open).filter_map(|found| {
            let n = found.difference?.n;
            Some(format!("{} {} (there are {n})", self.arms[found.arm].name, shown_seeds(Some(found.seeds_needed()?))))
        });
        let needed: Vec<String> = needed.collect();
        (!needed.is_empty()).then(|| {
            format!(
                "Seeds that a difference as large as the one seen would need, to exclude 0 from its interval in 80 % of such \
                 comparisons: {}.",
                needed.join(", ")
            )
        })
    }
}

fn space_before(unit: &str) -> String {
    if unit.is_empty() { String::new() } else { format!(" {unit}") }
}

#[cfg(test)]
mod tests {
    use crate::simulation::{outcome, run};

    #[test]
    fn two_seeds_are_warned_of() {
        let arm = |losses: &[f64]| (0u64..).zip(losses).map(|(seed, &loss)| run(seed, [loss; 2])).collect::<Vec<_>>();
        let warnings =
            |seeds: usize| outcome(vec![arm(&[1.0, 1.1, 1.3][..seeds]), arm(&[0.5, 0.7, 0.8][..seeds])], "").warnings();
        let two = warnings(2);
        assert!(two.len() == 1 && two[0].starts_with("Two seeds only: arm 1."), "{two:?}");
        assert_eq!((warnings(1), warnings(3)), (vec![], vec![]));
    }
}
