//! The comparison of numbers, for the whole project: element by element, in f64, with the worst place named.
//!
//! Folding differences with `f32::max` drops a NaN, and so does the maximum of a tensor on some backends: a result that is
//! nothing but NaN then agrees with everything. Here a NaN never agrees, not even with another one; an infinity agrees with
//! the same infinity only; and nothing agrees with tensors of other lengths, or with nothing at all.

use std::fmt;

use burn::tensor::Tensor;

/// The allowed difference of two numbers: a share of the largest number that is wanted, an absolute part, or both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    share: f64,
    least: f64,
    absolute: f64,
}

impl Tolerance {
    /// Nothing at all.
    pub const EXACT: Self = Self::absolute(0.0);

    /// This much, whatever the numbers are.
    pub const fn absolute(allowed: f64) -> Self {
        Self { share: 0.0, least: 0.0, absolute: allowed }
    }

    /// This share of the largest of the wanted numbers.
    pub const fn relative(share: f64) -> Self {
        Self { share, least: 0.0, absolute: 0.0 }
    }

    /// Takes the largest number as at least this, for tensors that may be next to zero throughout.
    pub const fn of_at_least(self, least: f64) -> Self {
        Self { least, ..self }
    }

    /// And this much more.
    pub const fn plus(self, absolute: f64) -> Self {
        Self { absolute, ..self }
    }

    fn allowed(self, largest: f64) -> f64 {
        self.absolute + self.share * largest.max(self.least)
    }
}

/// The largest difference of two lists of numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// The largest difference.
    pub worst: f64,
    /// Its index.
    pub at: usize,
    /// The largest finite number that is wanted, without its sign.
    pub largest: f64,
}

/// Why numbers cannot be compared, or do not agree.
#[derive(Debug, Clone, PartialEq)]
pub enum Disagreement {
    /// One has more numbers than the other.
    Lengths {
        /// How many there are.
        got: usize,
        /// How many are wanted.
        want: usize,
    },
    /// There are no numbers.
    Empty,
    /// One is NaN, or an infinity that the other is not.
    Kind {
        /// Where.
        at: usize,
        /// What is there.
        got: f64,
        /// What is wanted there.
        want: f64,
    },
    /// They are further apart than is allowed.
    Apart {
        /// By how much, and where.
        difference: Difference,
        /// What is there.
        got: f64,
        /// What is wanted there.
        want: f64,
        /// What they may differ by.
        allowed: f64,
    },
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lengths { got, want } => write!(f, "{got} numbers, expected {want}"),
            Self::Empty => write!(f, "no numbers to compare"),
            Self::Kind { at, got, want } => write!(f, "number {at} is {got}, expected {want}"),
            Self::Apart { difference: Difference { worst, at, largest }, got, want, allowed } => write!(
                f,
                "number {at} is {got}, expected {want}: off by {worst:.3e}, allowed {allowed:.3e} (largest {largest:.3e})"
            ),
        }
    }
}

impl std::error::Error for Disagreement {}

/// The largest difference of `got` from `want`.
///
/// # Errors
/// If they cannot be compared: other lengths, no numbers, a NaN, an infinity that only one of them has.
pub fn difference<T: Copy + Into<f64>>(got: &[T], want: &[T]) -> Result<Difference, Disagreement> {
    if got.len() != want.len() {
        return Err(Disagreement::Lengths { got: got.len(), want: want.len() });
    }
    if want.is_empty() {
        return Err(Disagreement::Empty);
    }
    let mut found = Difference { worst: 0.0, at: 0, largest: 0.0 };
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let (got, want): (f64, f64) = (got.into(), want.into());
        if !(got.is_finite() && want.is_finite()) {
            // The same infinity on both sides; a NaN equals nothing.
            if got == want {
                continue;
            }
            return Err(Disagreement::Kind { at, got, want });
        }
        found.largest = found.largest.max(want.abs());
        let apart = (got - want).abs();
        if apart > found.worst {
            (found.worst, found.at) = (apart, at);
        }
    }
    Ok(found)
}

/// Whether `got` is within `tolerance` of `want`.
///
/// # Errors
/// As [`difference`], and if they are further apart.
pub fn close<T: Copy + Into<f64>>(got: &[T], want: &[T], tolerance: Tolerance) -> Result<(), Disagreement> {
    let difference = difference(got, want)?;
    let allowed = tolerance.allowed(difference.largest);
    // A tolerance that is NaN allows nothing.
    if difference.worst <= allowed {
        return Ok(());
    }
    let (got, want) = (got[difference.at].into(), want[difference.at].into());
    Err(Disagreement::Apart { difference, got, want, allowed })
}

/// Fails a test unless `got` is within `tolerance` of `want`.
///
/// # Panics
/// Naming `what`, the worst place and what is allowed.
#[track_caller]
pub fn assert_close<T: Copy + Into<f64>>(what: &str, got: &[T], want: &[T], tolerance: Tolerance) {
    if let Err(disagreement) = close(got, want, tolerance) {
        panic!("{what}: {disagreement}");
    }
}

/// [`assert_close`] of tensors, whose shapes must agree too.
///
/// # Panics
/// As [`assert_close`].
#[track_caller]
pub fn assert_tensors_close<const D: usize>(what: &str, got: Tensor<D>, want: Tensor<D>, tolerance: Tolerance) {
    assert_eq!(got.dims(), want.dims(), "{what}: shapes");
    assert_close(what, &numbers(got), &numbers(want), tolerance);
}

/// The largest difference of two tensors of one shape, for tests that want them to differ, or to agree.
///
/// # Panics
/// If they cannot be compared: see [`difference`].
#[track_caller]
pub fn largest_difference<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes");
    match difference(&numbers(a), &numbers(b)) {
        Ok(difference) => difference.worst,
        Err(disagreement) => panic!("{disagreement}"),
    }
}

/// The largest of numbers and `least`; NaN where one of them is, which a fold with `f64::max` would leave out.
pub fn largest(least: f64, values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(least, |most, value| if value > most || value.is_nan() { value } else { most })
}

/// A tensor's numbers.
pub fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    const NAN: f64 = f64::NAN;
    const INFINITY: f64 = f64::INFINITY;

    #[test]
    fn the_largest_of_what_is_no_number_is_none() {
        assert_eq!((largest(0.0, [1.0, 3.0, 2.0]), largest(5.0, [1.0]), largest(0.0, [])), (3.0, 5.0, 0.0));
        for values in [[f64::NAN, 1.0], [1.0, f64::NAN], [f64::NAN, f64::INFINITY]] {
            assert!(largest(0.0, values).is_nan(), "{values:?}");
        }
    }

    #[test]
    fn what_is_no_number_agrees_with_nothing() {
        let loose = Tolerance::absolute(1e9);
        let agree = |got: &[f64], want: &[f64]| close(got, want, loose).is_ok() && close(want, got, loose).is_ok();
        assert!(agree(&[1.0, 2.0], &[1.0, 2.0]));
        for at in 0..3 {
            let mut spoilt = [1.0, 2.0, 3.0];
            for value in [NAN, -NAN, INFINITY, -INFINITY] {
                spoilt[at] = value;
                assert!(!agree(&spoilt, &[1.0, 2.0, 3.0]), "{value} at {at}");
                assert!(close(&spoilt, &[1.0, 2.0, 3.0], Tolerance::absolute(INFINITY)).is_err(), "{value} at {at}");
            }
        }
        assert!(!agree(&[NAN], &[NAN]), "NaN is no result, wherever it comes from");
        assert!(agree(&[INFINITY, 1.0], &[INFINITY, 1.0]));
        assert!(!agree(&[INFINITY], &[-INFINITY]));
        assert!(!agree(&[INFINITY], &[NAN]));
        assert!(!agree(&[], &[]));
        assert!(!agree(&[1.0], &[1.0, 1.0]));
        assert!(close(&[1.0], &[2.0], Tolerance::absolute(NAN)).is_err());
    }

    #[test]
    fn tolerances_are_what_they_say() {
        let ok = |got: f64, tolerance| close(&[got, 10.0], &[1.0, 10.0], tolerance).is_ok();
        assert!(ok(1.0, Tolerance::EXACT) && !ok(1.0 + 1e-12, Tolerance::EXACT));
        assert!(ok(1.25, Tolerance::absolute(0.25)) && !ok(1.26, Tolerance::absolute(0.25)));
        assert!(ok(1.5, Tolerance::relative(0.05)) && !ok(1.51, Tolerance::relative(0.05)), "of 10, the largest");
        let both = Tolerance::relative(0.05).plus(0.25);
        assert!(ok(1.75, both) && !ok(1.76, both));
        let next_to_zero = |tolerance| close(&[0.5], &[0.0], tolerance).is_ok();
        assert!(!next_to_zero(Tolerance::relative(0.5)));
        assert!(next_to_zero(Tolerance::relative(0.5).of_at_least(1.0)));
        // The largest of what is wanted counts, not of what is there, and infinities are not the largest.
        assert!(close(&[100.0, 1.0], &[10.0, 1.0], Tolerance::relative(1.0)).is_err());
        assert!(close(&[INFINITY, 2.0], &[INFINITY, 1.0], Tolerance::relative(0.5)).is_err());
    }

    #[test]
    fn the_worst_place_is_named() {
        let error = close(&[1.0f32, 2.5, 3.125], &[1.0, 2.0, 3.0], Tolerance::absolute(1e-3)).expect_err("apart");
        let told = error.to_string();
        assert!(told.contains("number 1 is 2.5, expected 2: off by 5.000e-1, allowed 1.000e-3"), "{told}");
        let told = close(&[1.0, NAN], &[1.0, 2.0], Tolerance::EXACT).expect_err("NaN").to_string();
        assert_eq!(told, "number 1 is NaN, expected 2");
    }

    #[test]
    fn tensors_of_other_shapes_and_with_nan_fail() {
        let fails = |test: &(dyn Fn() + std::panic::RefUnwindSafe)| std::panic::catch_unwind(test).is_err();
        let full = |shape: [usize; 2], value: f32| Tensor::<2>::full(shape, value, &Device::flex());
        assert_tensors_close("same", full([2, 3], 1.0), full([2, 3], 1.0), Tolerance::EXACT);
        assert_eq!(largest_difference(full([2, 3], 1.0), full([2, 3], 1.5)), 0.5);
        assert!(fails(&|| assert_tensors_close("", full([2, 3], 1.0), full([3, 2], 1.0), Tolerance::EXACT)));
        assert!(fails(&|| assert_tensors_close("", full([1, 1], f32::NAN), full([1, 1], f32::NAN), Tolerance::EXACT)));
        assert!(fails(&|| _ = largest_difference(full([1, 1], f32::NAN), full([1, 1], 1.0))));
    }
}
