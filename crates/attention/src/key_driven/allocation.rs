//! The allocation of query heads to key/value heads, from numbers about the keys.

/// Norms closer than this share of the largest one tell nothing apart; chosen by us (rounding in f32 is 6e-8).
const INDISTINCT: f64 = 1e-6;

/// As many query heads for each of `kv_heads`; the first ones get one more where that does not come out even.
pub fn even(kv_heads: usize, n_heads: usize) -> Vec<usize> {
    (0..kv_heads).map(|head| n_heads / kv_heads + usize::from(head < n_heads % kv_heads)).collect()
}

/// KDGQA's shares of the query heads: how far each norm is above the smallest one, so that the smallest has none. `None`
/// where the norms do not differ, which divides by zero in the authors' code.
pub fn shares_of_range(norms: &[f64]) -> Option<Vec<f64>> {
    let (low, high) =
        norms.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &norm| (low.min(norm), high.max(norm)));
    let apart = high - low > INDISTINCT * high;
    apart.then(|| shares(&norms.iter().map(|norm| (norm - low) / (high - low)).collect::<Vec<_>>())).flatten()
}

/// Each number's share of their sum; `None` where the sum is no positive number.
pub fn shares(magnitudes: &[f64]) -> Option<Vec<f64>> {
    let sum: f64 = magnitudes.iter().sum();
    (sum > 0.0 && sum.is_finite()).then(|| magnitudes.iter().map(|magnitude| magnitude / sum).collect())
}

/// The nearest whole numbers of query heads, half to even; their sum may miss `n_heads`.
pub fn nearest(shares: &[f64], n_heads: usize) -> Vec<usize> {
    shares.iter().map(|share| (share * n_heads as f64).round_ties_even() as usize).collect()
}

/// KDGQA: by the range of the norms. What rounding leaves over goes from the largest and to the smallest, the first of equals.
pub fn by_range(norms: &[f64], n_heads: usize) -> Vec<usize> {
    let Some(shares) = shares_of_range(norms) else { return even(norms.len(), n_heads) };
    let mut counts = nearest(&shares, n_heads);
    loop {
        let sum: usize = counts.iter().sum();
        let heads = 0..counts.len();
        if sum > n_heads {
            // `max_by_key` takes the last of equals: the order is turned round.
            let most = heads.rev().max_by_key(|&head| counts[head]);
            most.into_iter().for_each(|head| counts[head] -= 1);
        } else if sum < n_heads {
            let fewest = heads.min_by_key(|&head| counts[head]);
            fewest.into_iter().for_each(|head| counts[head] += 1);
        } else {
            return counts;
        }
    }
}

/// DGQA: in proportion to magnitudes. Where rounding does not come out even, the authors' code draws heads at random; here the
/// largest remainders are rounded up, the first of equals.
pub fn in_proportion(magnitudes: &[f64], n_heads: usize) -> Vec<usize> {
    let Some(shares) = shares(magnitudes) else { return even(magnitudes.len(), n_heads) };
    let counts = nearest(&shares, n_heads);
    if counts.iter().sum::<usize>() == n_heads {
        return counts;
    }
    let exact: Vec<f64> = shares.iter().map(|share| share * n_heads as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|exact| *exact as usize).collect();
    let left = n_heads.saturating_sub(counts.iter().sum());
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    order.iter().take(left).for_each(|&head| counts[head] += 1);
    counts
}

/// For each query head, the key/value head that it reads: query heads of one stand side by side.
pub fn head_map(query_heads: &[usize]) -> Vec<usize> {
    query_heads.iter().enumerate().flat_map(|(head, &count)| std::iter::repeat_n(head, count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_norm_has_no_heads_and_equal_norms_share_evenly() {
        assert_eq!(by_range(&[3.0, 1.0, 2.0], 6), [4, 0, 2]);
        assert_eq!(by_range(&[1.0, 7.0], 8), [0, 8]);
        assert_eq!(by_range(&[5.0, 5.0, 5.0], 8), [3, 3, 2]);
        assert_eq!(by_range(&[5.0], 4), [4]);
    }

    #[test]
    fn all_query_heads_are_given_away_whatever_rounding_does() {
        // Shares of 2.5 each round to even: 2 + 2 + 0 misses 5.
        assert_eq!(by_range(&[2.0, 2.0, 1.0], 5), [2, 2, 1]);
        assert_eq!(in_proportion(&[1.0, 1.0], 5), [3, 2]);
        assert_eq!(in_proportion(&[0.0, 0.0], 5), [3, 2]);
        assert_eq!(in_proportion(&[f64::NAN, 1.0], 4), [2, 2]);
        for n_heads in 1..20 {
            let norms: Vec<f64> = (1..=5).map(|at| (f64::from(at) * 12.9898).sin().abs()).collect();
            assert_eq!(by_range(&norms, n_heads).iter().sum::<usize>(), n_heads);
            assert_eq!(in_proportion(&norms, n_heads).iter().sum::<usize>(), n_heads);
        }
    }

    #[test]
    fn query_heads_of_one_key_head_stand_side_by_side() {
        assert_eq!(head_map(&[2, 0, 1]), [0, 0, 2]);
    }
}
