//! Which conversations are for training, which for validation, and which for tracking.

use crate::DataError;

/// Per row of the files: whether it is held out, and whether it is tracked.
pub(crate) struct ChatSplit {
    held_out: Vec<bool>,
    tracked: Vec<bool>,
}

impl ChatSplit {
    /// Rows by their hashes, so that more of them move none to another side. Where chance leaves a side of few rows empty, the
    /// last ones fill it. `validation` is `None` where rows behind these are given for it, `tracked` without tracking.
    ///
    /// # Errors
    /// If there is one row alone to train and to validate on.
    pub(crate) fn of(hashes: &[u64], validation: Option<f64>, tracked: Option<f64>) -> Result<Self, DataError> {
        if hashes.len() < 2 && validation.is_some() {
            let problem = "data.chat: there is one conversation to train and to validate on, where each takes its own: \
                           give at least 2";
            return Err(DataError::Unusable(problem.into()));
        }
        let below = |hash: u64, share: f64| (hash as f64) < share * u64::MAX as f64;
        let share = validation.unwrap_or(0.0);
        let mut held_out: Vec<bool> = hashes.iter().map(|&hash| below(hash, share)).collect();
        if validation.is_some() && held_out.iter().all(|&out| out == held_out[0]) {
            held_out = (1..=hashes.len()).map(|row| row == hashes.len()).collect();
        }
        let kept_out = share + tracked.unwrap_or(0.0);
        let mut watched: Vec<bool> = hashes
            .iter()
            .zip(&held_out)
            .map(|(&hash, &out)| tracked.is_some() && !out && below(hash, kept_out))
            .collect();
        let others: Vec<usize> = (0..hashes.len()).filter(|&row| !held_out[row]).collect();
        if let [first, .., last] = others[..]
            && tracked.is_some()
        {
            watched[last] |= others.iter().all(|&row| !watched[row]);
            watched[first] &= others.iter().any(|&row| !watched[row]);
        }
        Ok(Self { held_out, tracked: watched })
    }

    /// Whether row number `row` is validated on, as all behind those that were split are.
    pub(crate) fn held_out(&self, row: usize) -> bool {
        self.held_out.get(row).copied().unwrap_or(true)
    }

    /// Whether row number `row` is for tracking.
    pub(crate) fn tracked(&self, row: usize) -> bool {
        self.tracked.get(row).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_side_gets_a_row_where_there_are_enough() {
        let sides = |hashes: &[u64], tracked| {
            let sides = ChatSplit::of(hashes, Some(0.1), tracked).unwrap();
            let of = |row| match (sides.held_out(row), sides.tracked(row)) {
                (false, false) => 'l',
                (true, false) => 'v',
                (false, true) => 't',
                (true, true) => panic!("row {row} is on two sides"),
            };
            (0..hashes.len()).map(of).collect::<String>()
        };
        let at = |share: f64| (share * u64::MAX as f64) as u64;
        assert_eq!(sides(&[at(0.05), at(0.15), at(0.5), at(0.01)], Some(0.1)), "vtlv");
        assert_eq!(sides(&[at(0.05), at(0.15), at(0.5), at(0.01)], None), "vllv");
        // Too few to choose from: none held out, all held out, none tracked, all tracked.
        assert_eq!(sides(&[at(0.5), at(0.6), at(0.7)], Some(0.1)), "ltv");
        assert_eq!(sides(&[at(0.01), at(0.02)], None), "lv");
        assert_eq!(sides(&[at(0.05), at(0.5), at(0.6)], Some(0.1)), "vlt");
        assert_eq!(sides(&[at(0.05), at(0.15), at(0.16)], Some(0.1)), "vlt");
        assert!(ChatSplit::of(&[1], Some(0.1), None).is_err());
        let given = ChatSplit::of(&[at(0.01), at(0.02)], None, None).unwrap();
        assert_eq!([0, 1, 2].map(|row| given.held_out(row)), [false, false, true]);
    }
}
