//! Loops over rows of f32, compiled once per instruction set and chosen at run time.
//!
//! Every function is plain Rust that the compiler vectorises: sums and maxima go through [`LANES`] independent lanes, so
//! that the order of additions, and with it the result, is fixed by the code and not by the number of threads.
//!
//! What a function only writes need not hold values before; it is given back as values.

use std::mem::MaybeUninit;

/// Lanes of a sum or maximum: two AVX-512 registers, four of AVX2, eight of NEON.
const LANES: usize = 32;

/// `e^x` within 2 units in the last place: 2^i times a polynomial of the rest, which is taken off in two steps so that
/// nothing is lost (Cody and Waite; the coefficients are those of Cephes). Below -87 it is 1.6e-38, not 0; callers write
/// zeros where nothing is visible.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    // ln 2 in two parts; the first has few enough bits that its products are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const C: [f32; 6] = [0.5, 0.166_666_66, 0.041_665_796, 8.333_452e-3, 1.398_2e-3, 1.987_569_2e-4];
    // Comparisons in this order are one instruction each, and let a NaN through.
    let x = if -87.0 > x { -87.0 } else { x };
    let x = if 88.0 < x { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let f = x - whole * LN_2[0] - whole * LN_2[1];
    let p = C[0] + f * (C[1] + f * (C[2] + f * (C[3] + f * (C[4] + f * C[5]))));
    // The low bits of the shifted number are the integer: moved into the exponent, they make 2^i without a conversion.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    (1.0 + (f + f * f * p)) * power
}

#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The sum of `term(i)` over `0..n`, in lanes.
#[inline(always)]
fn sum(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    let mut at = 0;
    while at < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(at + lane);
        }
        at += LANES;
    }
    let mut rest = 0f32;
    while at < n {
        rest += term(at);
        at += 1;
    }
    lanes.iter().sum::<f32>() + rest
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
fn inverse_root(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

/// The share of x that is subtracted from the gradient of a normalised row.
#[inline(always)]
fn along(x: &[f32], w: &[f32], dy: &[f32], inverse: f32) -> f32 {
    let n = x.len();
    let (w, dy) = (&w[..n], &dy[..n]);
    sum(n, |i| x[i] * w[i] * dy[i]) * inverse * inverse * inverse / n as f32
}

/// The gradient of the gate of a gated unit; `s` is its sigmoid.
#[inline(always)]
pub(crate) fn gate_gradient(gate: f32, up: f32, dy: f32, s: f32) -> f32 {
    dy * up * s * (1.0 + gate * (1.0 - s))
}

/// `y = value(i)`
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices alike in all slices are what the compiler vectorises
fn write(y: &mut [MaybeUninit<f32>], value: impl Fn(usize) -> f32) -> &mut [f32] {
    for i in 0..y.len() {
        y[i].write(value(i));
    }
    // SAFETY: the loop has written every value.
    unsafe { y.assume_init_mut() }
}

/// `(y, z) = values(i)`
///
/// # Panics
/// If they differ in length.
#[inline(always)]
fn write_both<'y, 'z>(
    y: &'y mut [MaybeUninit<f32>],
    z: &'z mut [MaybeUninit<f32>],
    values: impl Fn(usize) -> (f32, f32),
) -> (&'y mut [f32], &'z mut [f32]) {
    let n = y.len();
    assert!(n == z.len(), "results of one length");
    for i in 0..n {
        let (of_y, of_z) = values(i);
        y[i].write(of_y);
        z[i].write(of_z);
    }
    // SAFETY: the loop has written every value of both.
    unsafe { (y.assume_init_mut(), z.assume_init_mut()) }
}

/// Exactly what the widest functions below are compiled for.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

/// The instruction set that the fused operations use on this machine.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            return "AVX-512";
        }
        if has_avx2() {
            return "AVX2";
        }
    }
    // What the compiler may use everywhere.
    if cfg!(target_arch = "aarch64") { "NEON" } else { "the portable one" }
}

/// Defines functions that pick the widest instruction set of the machine at each call (a load and a branch).
macro_rules! vectorized {
    ($($(#[$doc:meta])* fn $name:ident $(<$($life:lifetime),+>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => { $(
        $(#[$doc])*
        // Flat arguments keep every instruction set's copy a plain function.
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name $(<$($life),+>)? ($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable $(<$($life),+>)? ($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($life),+>)? ($($arg: $type),*) $(-> $result)? { portable($($arg),*) }

                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($life),+>)? ($($arg: $type),*) $(-> $result)? { portable($($arg),*) }

                if $crate::simd::has_avx512() {
                    // SAFETY: all features that it is compiled for were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::simd::has_avx2() {
                    // SAFETY: all features that it is compiled for were just detected.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    )* };
}
pub(crate) use vectorized;

vectorized! {
    /// The largest value; negative infinity of nothing.
    fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = x.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (best, &value) in lanes.iter_mut().zip(chunk) {
                *best = if value > *best { value } else { *best };
            }
        }
        let rest = chunks.remainder().iter().copied();
        lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, |best, value| if value > best { value } else { best })
    }

    /// `x = e^(x - shift)`; gives the sum.
    fn exp_shifted(x: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let mut chunks = x.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (total, value) in lanes.iter_mut().zip(chunk) {
                *value = exp(*value - shift);
                *total += *value;
            }
        }
        let mut rest = 0.0;
        for value in chunks.into_remainder() {
            *value = exp(*value - shift);
            rest += *value;
        }
        lanes.iter().sum::<f32>() + rest
    }

    /// `x = e^(x - shift)`, without the sum.
    fn exp_only(x: &mut [f32], shift: f32) {
        for value in x {
            *value = exp(*value - shift);
        }
    }

    /// `x *= factor`
    fn scale(x: &mut [f32], factor: f32) {
        for value in x {
            *value *= factor;
        }
    }

    /// `x += y`
    fn add(x: &mut [f32], y: &[f32]) {
        let y = &y[..x.len()];
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }

    /// The sum of products.
    fn dot(x: &[f32], y: &[f32]) -> f32 {
        let y = &y[..x.len()];
        sum(x.len(), |i| x[i] * y[i])
    }

    /// Backward of the softmax: `dp = p * (dp - delta) * factor`.
    fn softmax_backward(dp: &mut [f32], p: &[f32], delta: f32, factor: f32) {
        let p = &p[..dp.len()];
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = *p * (*dp - delta) * factor;
        }
    }

    /// `y = x * w / sqrt(mean(x^2) + eps)`; gives the reciprocal of the root too.
    fn rms_norm<'y>(x: &[f32], w: &[f32], eps: f32, y: &'y mut [MaybeUninit<f32>]) -> (&'y mut [f32], f32) {
        let n = x.len();
        let (w, y) = (&w[..n], &mut y[..n]);
        let inverse = inverse_root(x, eps);
        (write(y, |i| x[i] * inverse * w[i]), inverse)
    }

    /// The reciprocal of the root, `1 / sqrt(mean(x^2) + eps)`.
    fn rms_inverse(x: &[f32], eps: f32) -> f32 {
        inverse_root(x, eps)
    }

    /// Backward of the norm: writes dx and adds to dw.
    fn rms_norm_backward<'y>(
        x: &[f32], w: &[f32], dy: &[f32], inverse: f32, dx: &'y mut [MaybeUninit<f32>], dw: &mut [f32],
    ) -> &'y mut [f32] {
        let n = x.len();
        let (w, dy, dx, dw) = (&w[..n], &dy[..n], &mut dx[..n], &mut dw[..n]);
        let along = along(x, w, dy, inverse);
        for i in 0..n {
            dx[i].write(w[i] * dy[i] * inverse - x[i] * along);
            dw[i] += dy[i] * x[i] * inverse;
        }
        // SAFETY: the loop has written every value.
        unsafe { dx.assume_init_mut() }
    }

    /// The part of [`rms_norm_backward`] that writes dx.
    fn rms_norm_back_to_x<'y>(
        x: &[f32], w: &[f32], dy: &[f32], inverse: f32, dx: &'y mut [MaybeUninit<f32>],
    ) -> &'y mut [f32] {
        let n = x.len();
        let (w, dy, dx) = (&w[..n], &dy[..n], &mut dx[..n]);
        let along = along(x, w, dy, inverse);
        write(dx, |i| w[i] * dy[i] * inverse - x[i] * along)
    }

    /// The part of [`rms_norm_backward`] that adds to dw.
    fn rms_norm_back_to_weight(x: &[f32], dy: &[f32], inverse: f32, dw: &mut [f32]) {
        let n = dw.len();
        let (x, dy) = (&x[..n], &dy[..n]);
        for i in 0..n {
            dw[i] += dy[i] * x[i] * inverse;
        }
    }

    /// `y = silu(gate) * up`
    fn swiglu<'y>(gate: &[f32], up: &[f32], y: &'y mut [MaybeUninit<f32>]) -> &'y mut [f32] {
        let n = y.len();
        let (gate, up) = (&gate[..n], &up[..n]);
        write(y, |i| gate[i] * sigmoid(gate[i]) * up[i])
    }

    /// Backward of [`swiglu`]: writes dgate and dup.
    fn swiglu_backward<'y, 'z>(
        gate: &[f32], up: &[f32], dy: &[f32], dgate: &'y mut [MaybeUninit<f32>], dup: &'z mut [MaybeUninit<f32>],
    ) -> (&'y mut [f32], &'z mut [f32]) {
        let n = dgate.len();
        let (gate, up, dy, dup) = (&gate[..n], &up[..n], &dy[..n], &mut dup[..n]);
        // Not through `write_both`: a closure as large as this one is compiled by itself, without vectors.
        for i in 0..n {
            let s = sigmoid(gate[i]);
            dgate[i].write(gate_gradient(gate[i], up[i], dy[i], s));
            dup[i].write(dy[i] * gate[i] * s);
        }
        // SAFETY: the loop has written every value of both.
        unsafe { (dgate.assume_init_mut(), dup.assume_init_mut()) }
    }

    /// The part of [`swiglu_backward`] that writes dgate.
    fn swiglu_back_to_gate<'y>(
        gate: &[f32], up: &[f32], dy: &[f32], dgate: &'y mut [MaybeUninit<f32>],
    ) -> &'y mut [f32] {
        let n = dgate.len();
        let (gate, up, dy) = (&gate[..n], &up[..n], &dy[..n]);
        for i in 0..n {
            dgate[i].write(gate_gradient(gate[i], up[i], dy[i], sigmoid(gate[i])));
        }
        // SAFETY: the loop has written every value.
        unsafe { dgate.assume_init_mut() }
    }

    /// The part of [`swiglu_backward`] that writes dup.
    fn swiglu_back_to_up<'y>(gate: &[f32], dy: &[f32], dup: &'y mut [MaybeUninit<f32>]) -> &'y mut [f32] {
        let n = dup.len();
        let (gate, dy) = (&gate[..n], &dy[..n]);
        write(dup, |i| dy[i] * gate[i] * sigmoid(gate[i]))
    }

    /// Turns the pairs (i, i + half) of one head; `sign` -1 turns back.
    fn rotate_halves<'y>(
        x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &'y mut [MaybeUninit<f32>],
    ) -> &'y mut [f32] {
        let half = x.len() / 2;
        assert!(y.len() == 2 * half, "pairs into {} values", y.len());
        let (first, second) = x.split_at(half);
        let (y_first, y_second) = y.split_at_mut(half);
        let (second, cos, sin) = (&second[..half], &cos[..half], &sin[..half]);
        write_both(y_first, y_second, |i| {
            let s = sign * sin[i];
            (first[i] * cos[i] - second[i] * s, second[i] * cos[i] + first[i] * s)
        });
        // SAFETY: both halves are written, and there is nothing else.
        unsafe { y.assume_init_mut() }
    }

    /// Turns the pairs (2i, 2i + 1) of one head; `sign` -1 turns back.
    fn rotate_pairs<'y>(
        x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &'y mut [MaybeUninit<f32>],
    ) -> &'y mut [f32] {
        let half = x.len() / 2;
        assert!(y.len() == 2 * half, "pairs into {} values", y.len());
        let pairs = x.chunks_exact(2).zip(y.chunks_exact_mut(2)).zip(&cos[..half]).zip(&sin[..half]);
        for (((x, y), cos), sin) in pairs {
            let s = sign * sin;
            y[0].write(x[0] * cos - x[1] * s);
            y[1].write(x[1] * cos + x[0] * s);
        }
        // SAFETY: every pair is written, and there is nothing else.
        unsafe { y.assume_init_mut() }
    }

    /// One update of AdamW; the numbers are those of `adamw.rs`, in its order.
    fn adamw(value: &mut [f32], first: &mut [f32], second: &mut [f32], grad: &[f32], numbers: &[f32; 9]) {
        let [grad_scale, rate, keep, beta1, rest1, beta2, rest2, correction, eps] = *numbers;
        let n = value.len();
        let (first, second, grad) = (&mut first[..n], &mut second[..n], &grad[..n]);
        for i in 0..n {
            let g = grad[i] * grad_scale;
            first[i] = first[i] * beta1 + g * rest1;
            second[i] = second[i] * beta2 + g * g * rest2;
            value[i] = value[i] * keep - rate * first[i] / (second[i].sqrt() * correction + eps);
        }
    }

    /// `y = a - factor * b`
    fn subtract(a: &[f32], b: &[f32], factor: f32, y: &mut [f32]) {
        let n = y.len();
        let (a, b) = (&a[..n], &b[..n]);
        for i in 0..n {
            y[i] = a[i] - factor * b[i];
        }
    }

    /// `y += factor * x`
    fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
        let x = &x[..y.len()];
        for (y, x) in y.iter_mut().zip(x) {
            *y += factor * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_whole_range() {
        for step in -8700..8800 {
            let x = step as f32 * 0.01;
            let (got, want) = (exp(x), f64::from(x).exp());
            assert!((f64::from(got) / want - 1.0).abs() < 3e-7, "e^{x}: {got} against {want}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(f32::NAN).is_nan(), "a broken score must not be hidden");
    }

    #[test]
    fn sums_and_maxima_cover_every_length() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7) % 13) as f32).collect();
            assert_eq!(dot(&x, &x), x.iter().map(|v| v * v).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
