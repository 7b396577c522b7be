//! What heads do, by their maps: how much of them lies on the previous token, on duplicates of a token, on what came behind such a
//! duplicate (induction: Elhage et al. 2021, Olsson et al. 2022, arXiv 2209.11895), as TransformerLens' `head_detector.py` defines it.
//!
//! Left out: its rounding of the `abs` score to three decimals.

/// What a head may attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pattern {
    /// The token before.
    PreviousToken,
    /// Earlier occurrences of the same token.
    DuplicateToken,
    /// What came behind earlier occurrences of the same token.
    Induction,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PreviousToken, Self::DuplicateToken, Self::Induction];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreviousToken => "previous_token",
            Self::DuplicateToken => "duplicate_token",
            Self::Induction => "induction",
        }
    }

    /// `[queries * keys]`, row by row: true where a query of `tokens` is to attend to a key.
    pub fn of(self, tokens: &[u32]) -> Vec<bool> {
        let attends = |query: usize, key: usize| match self {
            Self::PreviousToken => key + 1 == query,
            Self::DuplicateToken => key < query && tokens[key] == tokens[query],
            // Where a token repeats at once, the query itself is what came behind it.
            Self::Induction => key > 0 && key <= query && tokens[key - 1] == tokens[query],
        };
        (0..tokens.len() * tokens.len()).map(|at| attends(at / tokens.len(), at % tokens.len())).collect()
    }

    /// How many keys back its stripe is where a text of `period` tokens is repeated once.
    fn back(self, period: usize) -> usize {
        match self {
            Self::PreviousToken => 1,
            Self::DuplicateToken => period,
            Self::Induction => period - 1,
        }
    }
}

/// What a score leaves out of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Without {
    /// The first key, the usual sink.
    pub first_key: bool,
    /// The query itself.
    pub current: bool,
}

/// How well a map fits a pattern.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fit {
    /// The share of the weight that lies on the pattern: `Σ A P / Σ A`.
    pub share: f64,
    /// One minus the distance from a map that is the pattern: `1 - Σ |A - P| / T`.
    pub closeness: f64,
}

/// How well a map, `[queries * keys]` row by row, fits a pattern of the same shape.
pub fn fit(map: &[f32], pattern: &[bool], without: Without) -> Fit {
    let length = map.len().isqrt();
    let (mut on, mut all, mut distance) = (0.0, 0.0, 0.0);
    for (at, (&weight, &wanted)) in map.iter().zip(pattern).enumerate() {
        let (query, key) = (at / length, at % length);
        if (without.first_key && key == 0) || (without.current && key == query) {
            continue;
        }
        let (weight, wanted) = (f64::from(weight), f64::from(u8::from(wanted)));
        on += weight * wanted;
        all += weight;
        distance += (weight - wanted).abs();
    }
    Fit { share: if all == 0.0 { 0.0 } else { on / all }, closeness: 1.0 - distance / length.max(1) as f64 }
}

/// The mean weight on the diagonal of a pattern, where `map` is of a text of `period` tokens that is repeated once; from the second
/// copy on if `second_copy`, which leaves out that the last token of the first copy attends to the first one. 0 where there is none.
pub fn stripe(map: &[f32], pattern: Pattern, period: usize, second_copy: bool) -> f64 {
    let length = map.len().isqrt();
    let back = pattern.back(period);
    let first = if second_copy { back.max(period) } else { back };
    let weights = (first..length).map(|query| f64::from(map[query * length + query - back]));
    let count = weights.len();
    if count == 0 { 0.0 } else { weights.sum::<f64>() / count as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_of(pattern: &[bool]) -> Vec<f32> {
        pattern.iter().map(|&wanted| f32::from(u8::from(wanted))).collect()
    }

    #[test]
    fn a_map_that_is_the_pattern_fits_and_another_does_not() {
        let tokens = [5, 6, 7, 5, 6, 7];
        for pattern in Pattern::ALL {
            let own = map_of(&pattern.of(&tokens));
            for other in Pattern::ALL {
                let found = fit(&own, &other.of(&tokens), Without::default());
                assert_eq!(found.share, if other == pattern { 1.0 } else { 0.0 }, "{pattern:?} as {other:?}");
                assert_eq!(found.closeness == 1.0, other == pattern);
                let expected = if other == pattern { 1.0 } else { 0.0 };
                assert_eq!(stripe(&own, other, 3, true), expected, "{pattern:?} as {other:?}");
            }
        }
    }

    #[test]
    fn what_is_left_out_counts_nowhere() {
        // A head that rests on the first key, but for one query.
        let map = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.0];
        let pattern = Pattern::PreviousToken.of(&[1, 2, 3]);
        assert_eq!(fit(&map, &pattern, Without::default()).share, 1.5 / 3.0);
        assert_eq!(fit(&map, &pattern, Without { first_key: true, current: false }).share, 1.0);
        assert_eq!(fit(&[0.0; 9], &pattern, Without::default()).share, 0.0);
    }
}
