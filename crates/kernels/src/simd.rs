//! Loops over rows of f32, compiled once per instruction set and chosen at run time.
//!
//! Every function is plain Rust that the compiler vectorises: sums and maxima go through [`LANES`] independent lanes, so
//! that the order of additions, and with it the result, is fixed by the code and not by the number of threads.

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
fn sigmoid(x: f32) -> f32 {
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

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx2() -> bool {
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
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => { $(
        $(#[$doc])*
        // Flat arguments keep every instruction set's copy a plain function.
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $type),*) $(-> $result)? { portable($($arg),*) }

                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $type),*) $(-> $result)? { portable($($arg),*) }

                if has_avx512() {
                    // SAFETY: the features were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if has_avx2() {
                    // SAFETY: the features were just detected.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    )* };
}

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
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = *p * (*dp - delta) * factor;
        }
    }

    /// `y = x * w / sqrt(mean(x^2) + eps)`; gives the reciprocal of the root.
    fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        let n = x.len();
        let (w, y) = (&w[..n], &mut y[..n]);
        let inverse = 1.0 / (sum(n, |i| x[i] * x[i]) / n as f32 + eps).sqrt();
        for i in 0..n {
            y[i] = x[i] * inverse * w[i];
        }
        inverse
    }

    /// Backward of the norm: writes dx and adds to dw.
    fn rms_norm_backward(x: &[f32], w: &[f32], dy: &[f32], inverse: f32, dx: &mut [f32], dw: &mut [f32]) {
        let n = x.len();
        let (w, dy, dx, dw) = (&w[..n], &dy[..n], &mut dx[..n], &mut dw[..n]);
        let along = sum(n, |i| x[i] * w[i] * dy[i]) * inverse * inverse * inverse / n as f32;
        for i in 0..n {
            dx[i] = w[i] * dy[i] * inverse - x[i] * along;
            dw[i] += dy[i] * x[i] * inverse;
        }
    }

    /// `y = silu(gate) * up`
    fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
        let n = y.len();
        let (gate, up) = (&gate[..n], &up[..n]);
        for i in 0..n {
            y[i] = gate[i] * sigmoid(gate[i]) * up[i];
        }
    }

    /// Backward of [`swiglu`].
    fn swiglu_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let n = gate.len();
        let (up, dy, dgate, dup) = (&up[..n], &dy[..n], &mut dgate[..n], &mut dup[..n]);
        for i in 0..n {
            let s = sigmoid(gate[i]);
            dup[i] = dy[i] * gate[i] * s;
            dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        }
    }

    /// Turns the pairs (i, i + half) of one head; `sign` -1 turns back.
    fn rotate_halves(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &mut [f32]) {
        let half = x.len() / 2;
        let (first, second) = x.split_at(half);
        let (y_first, y_second) = y.split_at_mut(half);
        let (second, cos, sin, y_second) = (&second[..half], &cos[..half], &sin[..half], &mut y_second[..half]);
        for i in 0..half {
            let s = sign * sin[i];
            y_first[i] = first[i] * cos[i] - second[i] * s;
            y_second[i] = second[i] * cos[i] + first[i] * s;
        }
    }

    /// Turns the pairs (2i, 2i + 1) of one head; `sign` -1 turns back.
    fn rotate_pairs(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &mut [f32]) {
        for (((x, y), cos), sin) in x.chunks_exact(2).zip(y.chunks_exact_mut(2)).zip(cos).zip(sin) {
            let s = sign * sin;
            y[0] = x[0] * cos - x[1] * s;
            y[1] = x[1] * cos + x[0] * s;
        }
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
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a - factor * b;
        }
    }

    /// `y += factor * x`
    fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
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
