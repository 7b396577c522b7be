//! What a comparison found, in words.

use std::ops::Range;

use super::outcome::Outcome;

impl Outcome {
    /// What was found, in words; a sentence for each setting.
    pub fn finding(&self) -> String {
        let groups = self.comparison.groups();
        groups.into_iter().map(|(_, group)| self.finding_of(group)).collect::<Vec<_>>().join("\n")
    }

    fn finding_of(&self, group: Range<usize>) -> String {
        let metric = self.comparison.metric.metric();
        let first = self.comparison.base_of(group.start);
        let base = &self.arms[first].name;
        let Some(reached) = self.summary(first, metric) else {
            return format!("No run of the base arm, {base}, has finished: there is nothing to compare with.");
        };
        let shown = |value: f64| format!("{:+.*}", metric.decimals, value * metric.factor);
        let (mut worse, mut better, mut equal, mut alone) = (vec![], vec![], vec![], vec![]);
        for (arm, base) in self.pairs(group) {
            let name = self.comparison.plain_name(arm);
            let Some(difference) = self.difference(arm, base, metric) else {
                alone.push(format!("{name} (no run to compare)"));
                continue;
            };
            let mean = shown(difference.mean);
            match (difference.interval(), difference.beyond_chance()) {
                (Some((low, high)), Some(beyond)) => {
                    let words = format!("{name} ({mean}; {} to {}; n = {})", shown(low), shown(high), difference.n);
                    match beyond {
                        false => equal.push(words),
                        true if (difference.mean > 0.0) == self.comparison.metric.grows() => better.push(words),
                        true => worse.push(words),
                    }
                }
                _ => alone.push(format!("{name} ({mean})")),
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
        for (list, what) in [
            (better, "better beyond chance"),
            (worse, "worse beyond chance"),
            (equal, "no difference beyond chance"),
            (alone, "one seed or none, which tells nothing about chance"),
        ] {
            if !list.is_empty() {
                parts.push(format!("{what}: {}", list.join(", ")));
            }
        }
        words.push_str(&parts.join("; "));
        words.push('.');
        words
    }
}

fn space_before(unit: &str) -> String {
    if unit.is_empty() { String::new() } else { format!(" {unit}") }
}
