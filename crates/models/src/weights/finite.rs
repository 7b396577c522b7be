//! Whether weights are numbers that a model can compute with.

/// What is done with weights that are NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NonFinite {
    /// They are an error: whatever is computed with them is NaN.
    #[default]
    Refuse,
    /// They are taken as they are, for whoever looks for what went wrong.
    Allow,
}

/// Refuses a tensor that holds a NaN or an infinity.
///
/// # Errors
/// How many of its values are not finite, and where the first one is, as a sentence.
pub fn check_finite(name: &str, shape: &[usize], values: &[f32]) -> Result<(), String> {
    // The bits of an infinity without its sign: what is larger is NaN. One comparison for all: most weights are good.
    const INFINITY: u32 = 0x7f80_0000;
    if values.iter().fold(0, |largest, value| value.abs().to_bits().max(largest)) < INFINITY {
        return Ok(());
    }
    let mut bad = values.iter().enumerate().filter(|(_, value)| !value.is_finite());
    let Some((at, value)) = bad.next() else { return Ok(()) };
    let count = 1 + bad.count();
    let all = values.len();
    Err(format!("{name}: {count} of {all} values are not finite (the first is {value} at {:?})", place(at, shape)))
}

/// The indices of a place in a row-major tensor.
fn place(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut indices: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let index = at % size.max(1);
            at /= size.max(1);
            index
        })
        .collect();
    indices.reverse();
    indices
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_first_bad_value_is_told_with_its_place() {
        assert_eq!(check_finite("w", &[2, 2], &[0.0, f32::MAX, -0.0, f32::MIN_POSITIVE]), Ok(()));
        assert_eq!(check_finite("w", &[0], &[]), Ok(()));
        let values = [0.0, 1.0, 2.0, 3.0, f32::NEG_INFINITY, f32::NAN];
        let words = "w: 2 of 6 values are not finite (the first is -inf at [1, 1])";
        assert_eq!(check_finite("w", &[2, 3], &values), Err(words.into()));
        assert!(check_finite("w", &[6], &[0., 0., 0., 0., 0., f32::NAN]).unwrap_err().contains("NaN at [5]"));
    }
}
