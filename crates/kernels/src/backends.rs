//! Every operation on other backends against the fused ones of the CPU: outputs and all gradients, in f32 and, where the device
//! computes in them, with f16 and bf16 states. Only with `--features ndarray`, `--features cuda` (which needs a GPU) or `--features wgpu` (which needs a
//! Vulkan driver: a GPU's, or Mesa's for the processor, as `benches/gpu/check.sh` installs it).

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Bool, DType, Device, Int, Tensor};

use crate::comparison::{Tolerance, close, numbers};
use crate::testing::normal;
use crate::*;

/// Allowed difference in f32, relative to the largest entry; GPUs add in another order.
const F32: Tolerance = Tolerance::relative(1e-4).of_at_least(1e-3);
/// The same where states are f16, whose numbers have 11 bits.
const F16: Tolerance = Tolerance::relative(4e-3).of_at_least(2e-2);
/// The same where states are bf16, whose numbers have 8 bits.
const BF16: Tolerance = Tolerance::relative(2e-2).of_at_least(1e-1);

#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)] // kept for comparing numbers
fn ndarray_agrees() {
    all_operations_agree(&Device::ndarray());
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_agrees() {
    all_operations_agree(&first(burn::tensor::DeviceType::Cuda));
}

/// The two kernels round in other places, so that equal bits would mean that one of them never ran.
#[cfg(feature = "cuda-nvrtc")]
#[test]
fn cuda_multiplies_on_tensor_cores_unless_told_otherwise() {
    let device = first(burn::tensor::DeviceType::Cuda);
    let [q, k, v] = [(); 3].map(|()| in_type(normal::<4>([1, 2, 70, 64], &Device::flex()), DType::BF16));
    let [q, k, v] = [q, k, v].map(|x| x.to_device(&device));
    let run = |tensor_cores| {
        use_tensor_cores(tensor_cores);
        numbers(in_type(attention(q.clone(), k.clone(), v.clone(), &AttentionOptions::default()).hidden, DType::F32))
    };
    let [portable, on_tensor_cores] = [false, true].map(run);
    close(&on_tensor_cores, &portable, BF16).expect("both kernels say the same");
    assert_ne!(on_tensor_cores, portable);
}

/// Linear maps and what is made of them, in shapes that fill whole tiles and in others, forward and backward.
#[cfg(feature = "cuda-nvrtc")]
#[test]
fn cuda_multiplies_through_cublaslt_when_told_to() {
    let device = first(burn::tensor::DeviceType::Cuda);
    find_cublaslt(&device).expect("the library");
    let map = |[count, input, output]: [usize; 3], turned: bool| {
        let sizes = [count * input, input * output, output];
        operation(format!("linear {count} x {input} x {output}, turned: {turned}"), &sizes, 1, move |x| {
            let weight = match turned {
                false => matrix(&x[1], [input, output]),
                true => matrix(&x[1], [output, input]).transpose(),
            };
            linear(rows(&x[0], [1, count, input]), weight, Some(x[2].clone())).reshape([-1])
        })
    };
    let shapes = [[1, 64, 64], [128, 64, 256], [70, 96, 40], [33, 17, 5], [300, 1024, 130]];
    let maps = shapes.into_iter().flat_map(|shape| [map(shape, false), map(shape, true)]);
    let mut problems = Vec::new();
    use_cublaslt(true);
    for operation in maps.chain(products()) {
        for (dtype, tolerance) in [(DType::F32, F32), (DType::F16, F16), (DType::BF16, BF16)] {
            let found = disagreements(&operation, &device, dtype, tolerance);
            let verdict = if found.is_empty() { "agrees".to_owned() } else { found.join("; ") };
            println!("{} {dtype:?} through cuBLASLt: {verdict}", operation.name);
            problems.extend(found.into_iter().map(|problem| format!("{} {dtype:?}, {problem}", operation.name)));
        }
    }
    use_cublaslt(false);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// What the library has no algorithm for is left to Burn: here nothing may be.
#[cfg(feature = "cuda-nvrtc")]
#[test]
fn cuda_has_cublaslt_for_all_layouts() {
    use burn::backend::{BackendTensor, Cube, DispatchKindConversion, DispatchTensor};
    let device = first(burn::tensor::DeviceType::Cuda);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let made = |shape: [usize; 2], turned: bool| {
            let [rows, columns] = shape;
            let matrix = match turned {
                false => normal(shape, &device),
                true => normal::<2>([columns, rows], &device).transpose(),
            };
            let tensor: BackendTensor<Cube> = DispatchTensor::try_into_backend(in_type(matrix, dtype).into_dispatch())
                .expect("a tensor on the device");
            tensor.float()
        };
        for turned in [[false, false], [false, true], [true, false], [true, true]] {
            for [rows, inner, columns] in [[128, 64, 256], [72, 96, 40], [1, 64, 64], [304, 1024, 136]] {
                let (left, right) = (made([rows, inner], turned[0]), made([inner, columns], turned[1]));
                let product = crate::gpu::cublaslt::through_library(&left, &right);
                assert!(product.is_some(), "{rows} x {inner} x {columns} {dtype:?} {turned:?}");
            }
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_agrees() {
    all_operations_agree(&first(burn::tensor::DeviceType::Wgpu));
}

#[cfg(feature = "gpu")]
fn first(kind: burn::tensor::DeviceType) -> Device {
    let found = Device::enumerate(kind).into_vec().into_iter().next();
    found.unwrap_or_else(|| panic!("no such device: this test needs one"))
}

/// An operation of flat inputs.
struct Operation {
    name: String,
    /// How long the inputs are.
    sizes: Vec<usize>,
    /// How many of the inputs are states, which a model has in bf16 where it trains in it.
    states: usize,
    run: Run,
}

type Run = Box<dyn Fn(&[Tensor<1>]) -> Tensor<1>>;

fn operation(
    name: impl Into<String>,
    sizes: &[usize],
    states: usize,
    run: impl Fn(&[Tensor<1>]) -> Tensor<1> + 'static,
) -> Operation {
    Operation { name: name.into(), sizes: sizes.to_vec(), states, run: Box::new(run) }
}

/// Compares them all, or those with `OPERATION` of the environment in their names, and tells of each; fails with those that do not agree.
fn all_operations_agree(other: &Device) {
    let mut problems = Vec::new();
    let mut types = vec![(DType::F32, F32)];
    if other.supports_dtype(DType::F16) && !cfg!(feature = "ndarray") {
        types.push((DType::F16, F16));
    }
    if other.supports_dtype(DType::BF16) && !cfg!(feature = "ndarray") {
        types.push((DType::BF16, BF16));
    }
    let only = std::env::var("OPERATION").unwrap_or_default();
    let all = products()
        .into_iter()
        .chain(products_of_a_library())
        .chain(others())
        .chain(attentions([8, 12]))
        .chain(wide_attentions());
    // Every mask and option in widths that tensor cores take too.
    let all = all.chain(if cfg!(feature = "cuda-nvrtc") { attentions([64, 128]) } else { Vec::new() });
    let asked: Vec<Operation> = all.filter(|operation| operation.name.contains(&only)).collect();
    assert!(!asked.is_empty(), "no operation is called {only}");
    for operation in asked {
        let twice = cfg!(feature = "cuda-nvrtc") && operation.name.starts_with("attention");
        let types = types.iter().flat_map(|&(dtype, tolerance)| {
            let portable = twice && dtype != DType::F32;
            [Some((dtype, tolerance, true)), portable.then_some((dtype, tolerance, false))].into_iter().flatten()
        });
        for (dtype, tolerance, tensor_cores) in types {
            let start = Instant::now();
            let kernel = if tensor_cores { "" } else { ", by the portable kernel" };
            let name = format!("{} {dtype:?}{kernel}", operation.name);
            use_tensor_cores(tensor_cores);
            let found = disagreements(&operation, other, dtype, tolerance);
            let verdict = if found.is_empty() { "agrees".to_owned() } else { found.join("; ") };
            println!("{name}: {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
            problems.extend(found.into_iter().map(|problem| format!("{name}, {problem}")));
        }
    }
    use_tensor_cores(true);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// What differs between the device, with states of that type, and the CPU in f32: results are the output, then the gradients.
fn disagreements(operation: &Operation, other: &Device, dtype: DType, tolerance: Tolerance) -> Vec<String> {
    let cpu = Device::flex();
    // Numbers that the narrower type has too.
    let rounded = |n: &usize| numbers(in_type(in_type(normal::<1>([*n], &cpu), dtype), DType::F32));
    let values: Vec<Vec<f32>> = operation.sizes.iter().map(rounded).collect();
    let run = |device: &Device, dtype: DType, cotangent: Option<Vec<f32>>| {
        let device = device.clone().autodiff();
        let leaves: Vec<_> = values.iter().map(|v| Tensor::from_floats(&v[..], &device).require_grad()).collect();
        let typed = leaves.iter().enumerate().map(|(at, leaf)| match at < operation.states {
            true => in_type(leaf.clone(), dtype),
            false => leaf.clone(),
        });
        let out = in_type((operation.run)(&typed.collect::<Vec<_>>()), DType::F32);
        let cotangent = cotangent.unwrap_or_else(|| numbers(normal(out.dims(), &cpu)));
        let grads = (out.clone() * Tensor::from_floats(&cotangent[..], &device)).sum().backward();
        let grads = leaves.iter().map(|leaf| numbers(leaf.grad(&grads).expect("gradient")));
        (std::iter::once(numbers(out)).chain(grads).collect::<Vec<_>>(), cotangent)
    };
    let (want, cotangent) = run(&cpu, DType::F32, None);
    let (got, _) = run(other, dtype, Some(cotangent));
    let compared = got.iter().zip(&want).enumerate();
    compared
        .filter_map(|(at, (got, want))| Some(format!("result {at}: {}", close(got, want, tolerance).err()?)))
        .collect()
}

fn matrix(x: &Tensor<1>, shape: [usize; 2]) -> Tensor<2> {
    x.clone().reshape(shape)
}

fn rows(x: &Tensor<1>, shape: [usize; 3]) -> Tensor<3> {
    x.clone().reshape(shape)
}

fn heads(x: &Tensor<1>, shape: [usize; 4]) -> Tensor<4> {
    x.clone().reshape(shape)
}

/// Operations that are products for the most part.
fn products() -> Vec<Operation> {
    let selected = Arc::new(SelectedRows::new(&(0..2 * 7 * 3).map(|i| i % 5 < 3).collect::<Vec<_>>(), [2, 7, 3]));
    let same = selected.clone();
    vec![
        operation("linear", &[2 * 7 * 5, 5 * 6, 6], 1, |x| {
            linear(rows(&x[0], [2, 7, 5]), matrix(&x[1], [5, 6]), Some(x[2].clone())).reshape([-1])
        }),
        operation("adapted_linear", &[2 * 7 * 5, 5 * 6, 5 * 2, 2 * 6], 1, |x| {
            let adapter = [matrix(&x[2], [5, 2]), matrix(&x[3], [2, 6])];
            adapted_linear(rows(&x[0], [2, 7, 5]), matrix(&x[1], [5, 6]), adapter, 0.7).reshape([-1])
        }),
        operation("linear_into_heads", &[2 * 7 * 5, 5 * 12], 1, move |x| {
            linear_into_heads(rows(&x[0], [2, 7, 5]), matrix(&x[1], [5, 12]), &selected).reshape([-1])
        }),
        operation("linear_out_of_heads", &[2 * 7 * 12, 2 * 7 * 3, 12 * 5], 1, move |x| {
            let (heads, gates) = (rows(&x[0], [2, 7, 12]), rows(&x[1], [2, 7, 3]));
            linear_out_of_heads(heads, gates, matrix(&x[2], [12, 5]), &same).reshape([-1])
        }),
        operation("gated_mlp", &[2 * 7 * 8, 8 * 12, 8 * 12, 12 * 8], 1, |x| {
            let [gate, up, down] = [(1, [8, 12]), (2, [8, 12]), (3, [12, 8])].map(|(i, shape)| matrix(&x[i], shape));
            gated_mlp(rows(&x[0], [2, 7, 8]), gate, up, down).reshape([-1])
        }),
        operation("cross_entropy", &[9 * 6, 6 * 20], 1, |x| {
            let targets = Targets::new(&[3, 0, -100, 19, 5, 5, -100, 7, 1]);
            cross_entropy(matrix(&x[0], [9, 6]), matrix(&x[1], [6, 20]), &targets).sum
        }),
        operation("cross_entropy over 1,501", &[5 * 6, 6 * 1501], 1, |x| {
            let targets = Targets::new(&[3, 1500, -100, 1024, 0]);
            let made = cross_entropy(matrix(&x[0], [5, 6]), matrix(&x[1], [6, 1501]), &targets);
            made.sum + made.losses.sum() + made.correct.sum()
        }),
        operation("delta_rule", &[2 * 9 * 2 * 4, 2 * 9 * 2 * 4, 2 * 9 * 2 * 3, 2 * 9 * 2, 2 * 9 * 2], 0, |x| {
            let share = |i: usize| burn::tensor::activation::sigmoid(rows(&x[i], [2, 9, 2]));
            let short = |i: usize, width| heads(&x[i], [2, 9, 2, width]) * 0.5;
            let rule = DeltaRule { q: short(0, 4), k: short(1, 4), v: short(2, 3), beta: share(3), decay: share(4) };
            let state = Tensor::zeros([2, 2, 4, 3], &x[0].device());
            delta_rule(rule, state).0.reshape([-1])
        }),
        operation("short_convolution", &[2 * 9 * 6, 6 * 4], 0, |x| {
            let before = Before { inputs: None, of_document: Some((0..18).map(|at| at % 9 % 5).collect()) };
            short_convolution(rows(&x[0], [2, 9, 6]), matrix(&x[1], [6, 4]), before).reshape([-1])
        }),
    ]
}

/// What goes through a library where there is one, and through Burn's products where there is none: states that are not in the order of
/// positions, and a weight that is stored by columns.
fn products_of_a_library() -> Vec<Operation> {
    let map = operation("linear map", &[3 * 7 * 8, 8 * 12], 1, |x| {
        let (x, weight) = (rows(&x[0], [7, 3, 8]).swap_dims(0, 1), matrix(&x[1], [12, 8]).transpose());
        crate::linear::map(x.clone(), in_type(weight, x.dtype())).reshape([-1])
    });
    if cfg!(feature = "gpu") { vec![map] } else { Vec::new() }
}

/// Norms, gates, positions, tables, the optimiser.
fn others() -> Vec<Operation> {
    let mut all = vec![
        operation("rms_norm", &[3 * 7 * 16, 16], 1, |x| {
            rms_norm(rows(&x[0], [3, 7, 16]), x[1].clone(), 1e-5).reshape([-1])
        }),
        operation("rms_norm of long rows", &[3 * 2500, 2500], 1, |x| {
            rms_norm(matrix(&x[0], [3, 2500]), x[1].clone(), 1e-5).reshape([-1])
        }),
        operation("rms_norm of odd rows, across", &[257 * 70, 257], 1, |x| {
            rms_norm(matrix(&x[0], [257, 70]).transpose(), x[1].clone(), 1e-5).reshape([-1])
        }),
        // What is written is in the type of the products and its norm again, the stream is f32.
        operation("add_rms_norm", &[3 * 7 * 16, 3 * 7 * 16, 16], 1, |x| {
            let [written, stream] = [0, 1].map(|i| rows(&x[i], [3, 7, 16]));
            both_used(stream, Some(written), x[2].clone(), x[0].dtype())
        }),
        operation("add_rms_norm of long odd rows, across, in one type", &[257 * 5, 257 * 5, 257], 2, |x| {
            let [written, stream] = [0, 1].map(|i| rows(&x[i], [1, 257, 5]).swap_dims(1, 2));
            both_used(stream, Some(written), x[2].clone(), x[0].dtype())
        }),
        operation("add_rms_norm of nothing written", &[1, 3 * 2 * 1100, 1100], 1, |x| {
            let stream = rows(&x[1], [3, 2, 1100]) * in_type(x[0].clone(), DType::F32).unsqueeze();
            both_used(stream, None, x[2].clone(), x[0].dtype())
        }),
        operation("add_rms_norm, the sum alone", &[2 * 5 * 12, 2 * 5 * 12, 12], 1, |x| {
            let [written, stream] = [0, 1].map(|i| rows(&x[i], [2, 5, 12]));
            let norm = RmsNorm { weight: x[2].clone(), eps: 1e-5, dtype: x[0].dtype() };
            Tensor::cat(vec![add_rms_norm(stream, Some(written), norm).0.reshape([-1]), x[2].clone()], 0)
        }),
        operation("add_rms_norm, the norm alone", &[2 * 5 * 12, 2 * 5 * 12, 12], 1, |x| {
            let [written, stream] = [0, 1].map(|i| rows(&x[i], [2, 5, 12]));
            let norm = RmsNorm { weight: x[2].clone(), eps: 1e-5, dtype: x[0].dtype() };
            add_rms_norm(stream, Some(written), norm).1.reshape([-1])
        }),
        operation("layer_norm", &[3 * 7 * 16, 16, 16], 1, |x| {
            layer_norm(rows(&x[0], [3, 7, 16]), x[1].clone(), x[2].clone(), 1e-5).reshape([-1])
        }),
        operation("swiglu of an odd number, across", &[3 * 7 * 5, 3 * 7 * 5], 2, |x| {
            let [gate, up] = [0, 1].map(|i| rows(&x[i], [3, 7, 5]).swap_dims(1, 2));
            swiglu(gate, up).reshape([-1])
        }),
        operation("swiglu", &[3 * 7 * 16, 3 * 7 * 16], 2, |x| {
            swiglu(rows(&x[0], [3, 7, 16]), rows(&x[1], [3, 7, 16])).reshape([-1])
        }),
        operation("embedding", &[6 * 5], 0, |x| {
            let ids = Tensor::<1, Int>::from_ints([4, 0, 4, 1, 5], &x[0].device());
            embedding(matrix(&x[0], [6, 5]), ids).reshape([-1])
        }),
        operation("difference", &[2 * 8 * 5 * 6, 1], 1, |x| {
            difference(heads(&x[0], [2, 8, 5, 6]), x[1].clone(), 3).reshape([-1])
        }),
        operation("subtract_noise", &[2 * 8 * 5 * 6, 1, 6], 1, |x| {
            let how = Combination { ratio: 3, eps: 1e-5, factor: 0.8 };
            subtract_noise(heads(&x[0], [2, 8, 5, 6]), x[1].clone(), x[2].clone(), how).reshape([-1])
        }),
        // It has no gradient: the numbers behind the means do. Several parts, and a last one that is not full.
        operation("sums of squares", &[1, 40, 70_001, 33_000], 2, |x| {
            let mut sums = SumsOfSquares::default();
            let places = x.iter().map(|x| sums.add(x.clone().inner()));
            assert!(places.eq(0..4));
            let means: Vec<f32> = sums.read().iter().zip(x).map(|(sum, x)| *sum as f32 / x.dims()[0] as f32).collect();
            let behind = x.iter().map(|x| in_type(x.clone(), DType::F32));
            Tensor::cat(std::iter::once(Tensor::from_floats(&means[..], &x[0].device())).chain(behind).collect(), 0)
        }),
        // It has no gradient: the last term gives it some.
        operation("adamw", &[40, 40, 40, 40], 0, |x| {
            let step = AdamwStep {
                grad_scale: 0.3,
                rate: 0.02,
                keep: 0.99,
                beta1: 0.9,
                beta2: 0.95,
                correction: 0.4,
                eps: 1e-8,
            };
            let [value, grad, first, second] = [0, 1, 2, 3].map(|i| x[i].clone().inner());
            let (value, [first, second]) = adamw(value, grad, [first, second.square()], step);
            let made = Tensor::from_inner(Tensor::cat(vec![value, first, second], 0));
            made + Tensor::cat(vec![x[0].clone() + x[1].clone(), x[2].clone(), x[3].clone()], 0)
        }),
    ];
    for layout in [RopeLayout::RotateHalf, RopeLayout::Interleaved] {
        let angles = normal::<2>([7, 4], &Device::flex()).into_data(); // the same on both
        all.push(operation(format!("rope {layout:?}"), &[2 * 3 * 7 * 8], 1, move |x| {
            let angles = Tensor::<2>::from_data(angles.clone(), &x[0].device());
            rope(heads(&x[0], [2, 3, 7, 8]), angles.clone().cos(), angles.sin(), layout).reshape([-1])
        }));
        let angles = normal::<2>([7, 3], &Device::flex()).into_data();
        all.push(operation(format!("rope by position of odd halves, {layout:?}"), &[2 * 5 * 7 * 6], 1, move |x| {
            let angles = Tensor::<2>::from_data(angles.clone(), &x[0].device());
            let by_position = heads(&x[0], [2, 7, 5, 6]).swap_dims(1, 2);
            rope(by_position, angles.clone().cos(), angles.sin(), layout).reshape([-1])
        }));
    }
    all
}

/// Both outputs of [`add_rms_norm`], the stream's gradient coming from beyond what the norm is used for.
fn both_used(stream: Tensor<3>, written: Option<Tensor<3>>, weight: Tensor<1>, dtype: DType) -> Tensor<1> {
    let (sum, normed) = add_rms_norm(stream, written, RmsNorm { weight, eps: 1e-5, dtype });
    let normed = in_type(normed, DType::F32).sin();
    Tensor::cat(vec![in_type(sum, DType::F32) + normed.clone(), normed], 2).reshape([-1])
}

const BATCH: usize = 2;
/// Two whole tiles of a GPU and a part of one.
const SEQ: usize = 150;

/// Of the widths of models, and of a single query, as in decoding.
fn wide_attentions() -> Vec<Operation> {
    let wide = |name: &str, [queries, keys]: [usize; 2], [width, value_width]: [usize; 2]| {
        let sizes = [4 * queries * width, 2 * keys * width, keys * value_width];
        operation(format!("attention, {name}"), &sizes, 3, move |x| {
            let (mask, offset) = (Mask::causal(), keys - queries);
            let options = AttentionOptions { mask: Some(&mask), query_offset: offset, ..Default::default() };
            let q = heads(&x[0], [1, 4, queries, width]);
            let [k, v] = [(1, 2, width), (2, 1, value_width)].map(|(i, n, width)| heads(&x[i], [1, n, keys, width]));
            attention(q, k, v, &options).hidden.reshape([-1])
        })
    };
    vec![
        wide("width 64", [70, 70], [64, 64]),
        wide("ragged widths", [70, 70], [40, 100]),
        wide("width 128", [65, 129], [128, 128]),
        wide("some queries behind a cache", [17, 90], [64, 64]),
        wide("one query", [1, 67], [64, 64]),
        wide("a width that is not of fours", [9, 9], [6, 10]),
    ]
}

/// Attention with 6 query heads, 3 key heads and 2 value heads, of so many channels and of so many in values: every mask and every option.
fn attentions(widths: [usize; 2]) -> Vec<Operation> {
    let attention_of = |name: &str, mask: Mask, more: &[usize], set: fn(&[Tensor<1>], &mut Options)| {
        attention_of(name, widths, mask, more, set)
    };
    let documents: Vec<u32> = (0..BATCH * SEQ).map(|i| (i % SEQ / 37) as u32).collect();
    let pieces: Vec<u32> = (0..BATCH * SEQ).map(|i| (i % SEQ / 9 % 3) as u32).collect();
    let turns: Vec<bool> = (0..BATCH * SEQ).map(|i| i / 41 % 2 == 0).collect();
    let masks = [
        ("no mask", Mask::none()),
        ("causal", Mask::causal()),
        ("lengths", Mask::none().with_lengths(&[0, 131])),
        ("window", Mask::causal().with_window(5)),
        ("window on both sides", Mask::none().with_window(70)),
        ("documents", Mask::causal().with_documents(&documents)),
        ("documents in pieces", Mask::causal().with_documents(&pieces)),
        ("turns", Mask::turns(&turns, SEQ)),
    ];
    let mut all: Vec<Operation> =
        masks.into_iter().map(|(name, mask)| attention_of(name, mask, &[], |_, _| ())).collect();
    all.push(attention_of("dense mask", Mask::none(), &[], |_, options| {
        let hidden: Vec<bool> = (0..SEQ * SEQ).map(|i| i % SEQ != i / SEQ && i % 3 == 0).collect();
        let hidden = Tensor::<1, Bool>::from_data(&hidden[..], &options.device).reshape([1, 1, SEQ, SEQ]);
        options.mask = Mask::none().with_dense(hidden);
    }));
    all.push(attention_of("softcap", Mask::causal(), &[], |_, options| options.softcap = Some(1.5)));
    all.push(attention_of("sinks", Mask::causal(), &[6], |x, options| options.sinks = Some(x[3].clone())));
    all.push(attention_of("bias", Mask::causal(), &[6 * SEQ * SEQ], |x, options| {
        options.bias = Some(heads(&x[3], [1, 6, SEQ, SEQ]));
    }));
    all.push(attention_of("maps of heads", Mask::causal(), &[], |_, options| {
        (options.keys, options.values) = (HeadMap::Each(vec![0, 0, 1, 1, 1, 2]), HeadMap::Each(vec![1, 0, 1, 0, 0, 0]));
    }));
    all.push(attention_of("selected rows", Mask::causal(), &[], |_, options| {
        let chosen: Vec<bool> = (0..BATCH * SEQ * 6).map(|i| i % 7 < 3).collect();
        options.selected = Some(Arc::new(SelectedRows::new(&chosen, [BATCH, SEQ, 6])));
    }));
    all
}

/// What a case of attention changes.
struct Options {
    device: Device,
    mask: Mask,
    softcap: Option<f64>,
    sinks: Option<Tensor<1>>,
    bias: Option<Tensor<4>>,
    keys: HeadMap,
    values: HeadMap,
    selected: Option<Arc<SelectedRows>>,
}

fn attention_of(
    name: &str,
    [width, value_width]: [usize; 2],
    mask: Mask,
    more: &[usize],
    set: fn(&[Tensor<1>], &mut Options),
) -> Operation {
    let shapes = [(6, width), (3, width), (2, value_width)];
    let sizes = [&shapes.map(|(n, width)| BATCH * n * SEQ * width)[..], more].concat();
    let wide = if width < 64 { "" } else { ", wide" };
    operation(format!("attention, {name}{wide}"), &sizes, 3, move |x| {
        let (device, mask) = (x[0].device().inner(), mask.clone());
        let (keys, values) = (HeadMap::Even, HeadMap::Even);
        let mut own = Options { device, mask, softcap: None, sinks: None, bias: None, keys, values, selected: None };
        set(x, &mut own);
        let options = AttentionOptions {
            mask: Some(&own.mask),
            softcap: own.softcap,
            sinks: own.sinks,
            bias: own.bias,
            keys: own.keys,
            values: own.values,
            selected: own.selected,
            ..Default::default()
        };
        let [q, k, v] = [0, 1, 2].map(|i| heads(&x[i], [BATCH, shapes[i].0, SEQ, shapes[i].1]));
        attention(q, k, v, &options).hidden.reshape([-1])
    })
}
