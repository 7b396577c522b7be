//! Equal budgets: the value of a key for which an arm costs what the base arm costs.

use polyhead_recipe::Recipe;
use polyhead_runs::costs::Totals;

use super::comparison::Matched;

/// Values beyond are no widths of models; the largest that a recipe allows for d_ff.
const LARGEST: u64 = 1 << 20;
/// Where a number is not allowed, so many of its neighbours are looked at; chosen by us.
const NEIGHBOURS: u64 = 64;

/// What an arm was made equal to, and how close it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Match {
    /// The key that was sought.
    pub key: String,
    /// Its value.
    pub value: u64,
    /// What the base arm costs.
    pub target: u64,
    /// What this arm costs.
    pub found: u64,
}

impl Match {
    /// By which share this arm costs more (or less, where negative) than the base arm.
    pub fn deviation(&self) -> f64 {
        (self.found as f64 - self.target as f64) / (self.target as f64).max(1.0)
    }
}

impl Matched {
    /// What is made equal, in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Parameters => "parameters",
            Self::Flops => "FLOPs per token",
            Self::KvCache => "KV bytes per token",
            Self::Time => "ms of training",
        }
    }

    /// The cost that is made equal; 0 where it is none that can be computed.
    pub fn of(self, totals: &Totals) -> u64 {
        match self {
            Self::None | Self::Time => 0,
            Self::Parameters => totals.parameters,
            Self::Flops => totals.flops_per_token,
            Self::KvCache => totals.cached_bytes_per_token,
        }
    }
}

/// Seeks the whole number whose cost is nearest to `target`. `cost` must grow with the number; it tells `None` where the
/// recipe may not have it, as where heads must divide.
///
/// # Errors
/// Why there is none within `tolerance`, as a sentence about the key.
pub fn solve(key: &str, target: u64, tolerance: f64, cost: &dyn Fn(u64) -> Option<u64>) -> Result<Match, String> {
    let (mut low, mut high) = (0, LARGEST);
    // The largest number that costs no more than the target lies in low..high, if there is one.
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match (middle..high.min(middle + NEIGHBOURS)).find_map(|value| Some((value, cost(value)?))) {
            Some((value, found)) if found <= target => low = value,
            _ => high = middle,
        }
    }
    // The nearest ones that are allowed, below and above.
    let costs = |value: u64| Some(Match { key: key.to_owned(), value, target, found: cost(value)? });
    let below = (low.saturating_sub(NEIGHBOURS).max(1)..=low).rev().find_map(costs);
    let above = (low + 1..=(low + NEIGHBOURS).min(LARGEST)).find_map(costs);
    let Some(best) = below.into_iter().chain(above).min_by(|a, b| a.deviation().abs().total_cmp(&b.deviation().abs()))
    else {
        return Err(format!("no value of {key} is allowed near {low}, where it would cost {target}"));
    };
    let next = (best.value + 1..=best.value + NEIGHBOURS).find_map(cost);
    match best.deviation().abs() <= tolerance {
        _ if next == Some(best.found) => {
            Err(format!("{key} does not change what is to be matched: {}, not {target}", best.found))
        }
        true => Ok(best),
        false => Err(format!(
            "no value of {key} costs {target}: the nearest is {} with {}, {:+.2} % off, and {:.2} % are allowed",
            best.value,
            best.found,
            100.0 * best.deviation(),
            100.0 * tolerance
        )),
    }
}

/// What makes arms see other data, or more of it, than the base arm: the key, or `None`.
pub fn other_data(base: &Recipe, arm: &Recipe) -> Option<&'static str> {
    let (a, b) = (&base.training, &arm.training);
    [
        ("data", base.data == arm.data),
        ("tokenizer", base.tokenizer == arm.tokenizer),
        ("loader", base.loader == arm.loader),
        ("validation.fraction", base.validation.fraction == arm.validation.fraction),
        ("training.steps", a.steps == b.steps),
        ("training.seq_len", a.seq_len == b.seq_len),
        ("training.batch_size", a.batch_size == b.batch_size),
        ("training.gradient_accumulation_steps", a.gradient_accumulation_steps == b.gradient_accumulation_steps),
    ]
    .into_iter()
    .find(|(_, same)| !same)
    .map(|(key, _)| key)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_nearest_allowed_value_is_found() {
        let cost = |value: u64| Some(1000 + 7 * value);
        let found = solve("d_ff", 1000 + 7 * 187 + 3, 0.01, &cost).unwrap();
        assert_eq!((found.value, found.found), (187, 1000 + 7 * 187));
        let even = |value: u64| value.is_multiple_of(16).then(|| 1000 + 7 * value);
        let found = solve("d_ff", 1000 + 7 * 187 + 3, 0.02, &even).unwrap();
        assert_eq!(found.value, 192);
        assert!((found.deviation() - 32.0 / 2312.0).abs() < 1e-12, "{}", found.deviation());
        let divisors = |value: u64| [1, 2, 4, 8].contains(&value).then_some(512 * value);
        for (target, value) in [(512, 1), (1024, 2), (2048, 4), (4096, 8)] {
            assert_eq!(solve("n_kv_heads", target, 0.0, &divisors).unwrap().value, value);
        }
    }

    #[test]
    fn what_cannot_be_is_said() {
        let told = solve("n_kv_heads", 1600, 0.01, &|value| Some(1000 * value)).unwrap_err();
        assert!(told.contains("n_kv_heads") && told.contains("1600") && told.contains("+25.00 %"), "{told}");
        let told = solve("d_ff", 5, 0.01, &|_| Some(9)).unwrap_err();
        assert!(told.contains("does not change"), "{told}");
        let told = solve("d_ff", 500, 0.01, &|value| Some(1000 + value)).unwrap_err();
        assert!(told.contains("the nearest is 1 with 1001"), "{told}");
        let told = solve("d_ff", 500, 0.01, &|_| None).unwrap_err();
        assert!(told.contains("no value of d_ff is allowed"), "{told}");
    }
}
