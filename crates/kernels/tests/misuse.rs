//! Every public operation called wrongly, as anybody could call it: it has to panic with the names and shapes of what it was
//! given, or give an empty result, and never read or write what is not its own. Beside the crate and not in it, so that
//! scratch memory is without values here, as in a run: `tests/valgrind.sh` runs this too.

#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use polyhead_kernels::*;

/// Numbers that are all different, on the autodiff device.
fn some<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 97) as f32 / 97.0 - 0.4).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff()).require_grad()
}

/// The message of the panic.
fn refused<T>(call: impl FnOnce() -> T) -> String {
    let panic = catch_unwind(AssertUnwindSafe(call)).err().expect("a panic");
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()))
        .unwrap()
}

fn refuses<T>(told: &[&str], call: impl FnOnce() -> T) {
    let message = refused(call);
    for part in told {
        assert!(message.contains(part), "\"{message}\" does not say \"{part}\"");
    }
}

fn numbers<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    x.clone().into_data().iter::<f32>().collect()
}

/// What asks for the gradient of an input.
type Asked = Box<dyn Fn(&Gradients) -> Vec<f32>>;

/// An input without any value may be without a gradient: Burn's slices of it are new tensors.
fn of<const D: usize>(leaf: &Tensor<D>) -> Asked {
    let leaf = leaf.clone();
    Box::new(move |grads| match leaf.grad(grads) {
        Some(grad) => numbers(&grad),
        None if leaf.dims().contains(&0) => Vec::new(),
        None => panic!("no gradient of an input {:?}", leaf.dims()),
    })
}

/// The result is of this shape and finite; the gradients of its sum exist and are finite.
fn works<const D: usize>(got: Tensor<D>, shape: [usize; D], inputs: &[Asked]) {
    assert_eq!(got.dims(), shape);
    assert!(numbers(&got).iter().all(|value| value.is_finite()));
    let grads = got.sum().backward();
    assert!(inputs.iter().flat_map(|asked| asked(&grads)).all(|value| value.is_finite()));
}

#[test]
fn linear_maps() {
    refuses(&["linear: weight must have a row per channel of x", "x [2, 3, 4]", "weight [5, 6]"], || {
        linear(some([2, 3, 4]), some([5, 6]), None)
    });
    refuses(&["bias must have a value per column", "bias [7]"], || linear(some([3, 4]), some([4, 6]), Some(some([7]))));
    for [batch, seq, d_input, d_output] in [[0, 3, 4, 5], [2, 0, 4, 5], [2, 3, 0, 5], [2, 3, 4, 0]] {
        let (x, weight) = (some([batch, seq, d_input]), some([d_input, d_output]));
        works(linear(x.clone(), weight.clone(), None), [batch, seq, d_output], &[of(&x), of(&weight)]);
    }
    let zeros = linear(some([2, 0]), some([0, 3]), None);
    assert_eq!(numbers(&zeros), [0.0; 6]);
}

#[test]
fn gated_units() {
    refuses(&["swiglu: gate and up must be of one shape", "gate [1, 2, 3]", "up [1, 2, 2]"], || {
        swiglu(some([1, 2, 3]), some([1, 2, 2]))
    });
    refuses(&["swiglu", "gate [1, 2, 3]", "up [1, 2, 4]"], || swiglu(some([1, 2, 3]), some([1, 2, 4])));
    works(swiglu(some([2, 0, 3]), some([2, 0, 3])), [2, 0, 3], &[]);
    let call = |[gate, up, down]: [[usize; 2]; 3]| gated_mlp(some([1, 2, 4]), some(gate), some(up), some(down));
    refuses(&["gated_mlp: gate must have a row per channel of x", "gate [5, 6]"], || call([[5, 6], [5, 6], [6, 4]]));
    refuses(&["up must be of gate's shape", "up [4, 7]"], || call([[4, 6], [4, 7], [6, 4]]));
    refuses(&["down must be of gate's shape, transposed", "down [6, 5]"], || call([[4, 6], [4, 6], [6, 5]]));
    for [seq, d_model, d_ff] in [[0, 4, 6], [2, 0, 6], [2, 4, 0]] {
        let (x, gate, up) = (some([1, seq, d_model]), some([d_model, d_ff]), some([d_model, d_ff]));
        let down = some([d_ff, d_model]);
        let y = gated_mlp(x.clone(), gate.clone(), up.clone(), down.clone());
        works(y, [1, seq, d_model], &[of(&x), of(&gate), of(&up), of(&down)]);
    }
}

#[test]
fn norms() {
    refuses(&["rms_norm: weight must have a value per channel of x", "x [2, 3, 4]", "weight [5]"], || {
        rms_norm(some([2, 3, 4]), some([5]), 1e-5)
    });
    refuses(&["rms_norm", "weight [3]"], || rms_norm(some([2, 4]), some([3]), 1e-5));
    let norm = |channels| RmsNorm { weight: some([channels]), eps: 1e-5, dtype: DType::F32 };
    refuses(&["add_rms_norm: weight must have", "weight [5]"], || add_rms_norm(some([2, 4]), None, norm(5)).1);
    refuses(&["add_rms_norm: what is written must be of the shape of x", "written [1, 4]"], || {
        add_rms_norm(some([2, 4]), Some(some([1, 4])), norm(4)).1
    });
    refuses(&["layer_norm", "bias [3]"], || layer_norm(some([2, 4]), some([4]), some([3]), 1e-5));
    for [rows, channels] in [[0, 4], [3, 0]] {
        let (x, weight) = (some([rows, channels]), some([channels]));
        works(rms_norm(x.clone(), weight.clone(), 1e-5), [rows, channels], &[of(&x), of(&weight)]);
    }
}

#[test]
fn rotary_positions() {
    let call = |x, table: [usize; 2]| rope(some(x), some(table), some(table), RopeLayout::RotateHalf);
    refuses(&["rope: head_dim", "x [1, 2, 3, 5]"], || call([1, 2, 3, 5], [3, 2]));
    refuses(&["cos must be [seq, head_dim / 2]", "cos [2, 2]"], || call([1, 2, 3, 4], [2, 2]));
    refuses(&["sin must be", "sin [3, 1]"], || {
        rope(some([1, 2, 3, 4]), some([3, 2]), some([3, 1]), RopeLayout::Interleaved)
    });
    for shape in [[0, 2, 3, 4], [1, 0, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]] {
        works(call(shape, [shape[2], shape[3] / 2]), shape, &[]);
    }
}

#[test]
fn differences_of_heads() {
    let how = Combination { ratio: 2, eps: 1e-5, factor: 0.5 };
    let call =
        |heads, lambda: usize, weight: usize, how| subtract_noise(some(heads), some([lambda]), some([weight]), how);
    refuses(&["heads must come in groups", "heads [1, 5, 2, 4]"], || call([1, 5, 2, 4], 1, 4, how));
    refuses(&["lambda must be one number", "lambda [0]"], || call([1, 3, 2, 4], 0, 4, how));
    refuses(&["weight must have a value per channel", "weight [5]"], || call([1, 3, 2, 4], 1, 5, how));
    refuses(&["a group must have a signal head"], || call([1, 3, 2, 4], 1, 4, Combination { ratio: 0, ..how }));
    refuses(&["heads must come in groups"], || difference(some([1, 4, 2, 4]), some([1]), 2));
    for shape in [[0, 3, 2, 4], [1, 0, 2, 4], [1, 3, 0, 4], [1, 3, 2, 0]] {
        let [batch, heads, seq, width] = shape;
        works(call(shape, 1, width, how), [batch, heads / 3 * 2, seq, width], &[]);
    }
}

#[test]
fn losses() {
    let call = |hidden, head, targets: &[i64]| cross_entropy(some(hidden), some(head), &Targets::new(targets));
    refuses(&["cross_entropy: head must have a row per channel", "hidden [2, 3]", "head [4, 5]"], || {
        call([2, 3], [4, 5], &[0, 1])
    });
    refuses(&["there must be a target per token", "targets [3]"], || call([2, 3], [3, 5], &[0, 1, 2]));
    refuses(&["below the vocabulary's size, 5; token 1 has 5"], || call([2, 3], [3, 5], &[0, 5]));
    let (hidden, head) = (some([0, 3]), some([3, 5]));
    let none = cross_entropy(hidden.clone(), head.clone(), &Targets::new(&[]));
    assert_eq!((none.losses.dims(), none.correct.dims()), ([0], [0]));
    works(none.sum, [1], &[of(&hidden), of(&head)]);
    works(call([2, 3], [3, 0], &[-1, -1]).sum, [1], &[]);
    works(call([2, 0], [0, 5], &[3, -1]).sum, [1], &[]);
}

#[test]
fn updates() {
    let plain = |len: usize| some([len]).inner();
    let step = AdamwStep { grad_scale: 1.0, rate: 0.1, keep: 1.0, beta1: 0.9, beta2: 0.9, correction: 1.0, eps: 1e-8 };
    refuses(&["adamw", "value [4]", "grad [3]"], || adamw(plain(4), plain(3), [plain(4), plain(4)], step));
    refuses(&["adamw", "second [5]"], || adamw(plain(4), plain(4), [plain(4), plain(5)], step));
    assert_eq!(adamw(plain(0), plain(0), [plain(0), plain(0)], step).0.dims(), [0]);
}

#[test]
fn routed_maps() {
    let selected = |batch, seq, heads| Arc::new(SelectedRows::all([batch, seq, heads]));
    refuses(&["linear_into_heads: weight must have a row per channel of x", "x [1, 3, 4]", "weight [5, 6]"], || {
        linear_into_heads(some([1, 3, 4]), some([5, 6]), &selected(1, 3, 2))
    });
    refuses(&["selected rows must be [batch, seq, heads]", "selected [1, 2, 2]"], || {
        linear_into_heads(some([1, 3, 4]), some([4, 6]), &selected(1, 2, 2))
    });
    refuses(&["heads of one width"], || linear_into_heads(some([1, 3, 4]), some([4, 7]), &selected(1, 3, 2)));
    let out = |heads, gates, weight: [usize; 2]| {
        linear_out_of_heads(some(heads), some(gates), some(weight), &selected(1, 3, 2))
    };
    refuses(&["linear_out_of_heads: selected rows", "gates [1, 3, 3]"], || out([1, 3, 4], [1, 3, 3], [4, 5]));
    refuses(&["gates must be", "heads [1, 2, 4]"], || out([1, 2, 4], [1, 3, 2], [4, 5]));
    refuses(&["weight must have a row per channel of heads", "weight [5, 5]"], || out([1, 3, 4], [1, 3, 2], [5, 5]));
    refuses(&["one answer per position and head; chosen [3]"], || SelectedRows::new(&[true; 3], [1, 2, 2]));
    refuses(&["head 2 of 2"], || SelectedRows::all([1, 2, 2]).of_head(2).len());
    for [batch, seq, d_model, heads, width] in
        [[0, 3, 4, 2, 3], [1, 0, 4, 2, 3], [1, 3, 0, 2, 3], [1, 3, 4, 0, 3], [1, 3, 4, 2, 0]]
    {
        // The first head everywhere, the others nowhere.
        let chosen: Vec<bool> = (0..batch * seq * heads).map(|index| index % heads == 0).collect();
        for selected in [selected(batch, seq, heads), Arc::new(SelectedRows::new(&chosen, [batch, seq, heads]))] {
            let channels = heads * width;
            let y = linear_into_heads(some([batch, seq, d_model]), some([d_model, channels]), &selected);
            works(y, [batch, seq, channels], &[]);
            let (heads_in, gates) = (some([batch, seq, channels]), some([batch, seq, heads]));
            let y = linear_out_of_heads(heads_in, gates, some([channels, d_model]), &selected);
            works(y, [batch, seq, d_model], &[]);
        }
    }
}

fn attend(q: [usize; 4], k: [usize; 4], v: [usize; 4], options: &AttentionOptions<'_>) -> Tensor<4> {
    attention(some(q), some(k), some(v), options).hidden
}

#[test]
fn attention_of_wrong_shapes() {
    let (q, none) = ([2, 4, 3, 6], AttentionOptions::default());
    refuses(&["attention: q, k and v must have one batch", "k [1, 2, 5, 6]"], || {
        attend(q, [1, 2, 5, 6], [2, 2, 5, 6], &none)
    });
    refuses(&["k must be as wide as q", "k [2, 2, 5, 7]"], || attend(q, [2, 2, 5, 7], [2, 2, 5, 6], &none));
    refuses(&["k and v must have as many keys", "v [2, 2, 4, 6]"], || attend(q, [2, 2, 5, 6], [2, 2, 4, 6], &none));
    refuses(&["4 query heads cannot share 3 heads"], || attend(q, [2, 3, 5, 6], [2, 2, 5, 6], &none));
    refuses(&["4 query heads cannot share 0 heads"], || attend(q, [2, 2, 5, 6], [2, 0, 5, 6], &none));
    let kv = [2, 2, 5, 6];
    let each = |map: &[usize]| HeadMap::Each(map.to_vec());
    for (map, told) in
        [(&[0, 1, 2, 0][..], "query head 2 is to read head 2 of 2"), (&[0, 1], "a map of 2 entries for 4")]
    {
        // On the tiles, and with a bias in blocks.
        for bias in [None, Some(some([1, 1, 3, 5]))] {
            let options = AttentionOptions { keys: each(map), bias: bias.clone(), ..Default::default() };
            refuses(&["attention", told], || attend(q, kv, kv, &options));
            let options = AttentionOptions { values: each(map), bias, ..Default::default() };
            refuses(&["attention", told], || attend(q, kv, kv, &options));
        }
    }
    let with = |bias: [usize; 4]| AttentionOptions { bias: Some(some(bias)), ..Default::default() };
    refuses(&["bias must be", "bias [2, 4, 3, 4]"], || attend(q, kv, kv, &with([2, 4, 3, 4])));
    refuses(&["bias must be", "bias [3, 1, 3, 5]"], || attend(q, kv, kv, &with([3, 1, 3, 5])));
    let sinks = AttentionOptions { sinks: Some(some([2])), ..Default::default() };
    refuses(&["sinks must be [query heads]", "sinks [2]"], || attend(q, kv, kv, &sinks));
    let softcap = AttentionOptions { softcap: Some(0.0), ..Default::default() };
    refuses(&["softcap (0) must be above 0"], || attend(q, kv, kv, &softcap));
    refuses(&["a window of 0 keys"], || Mask::causal().with_window(0));
    let selected = Some(Arc::new(SelectedRows::all([2, 4, 4])));
    let options = AttentionOptions { selected, ..Default::default() };
    refuses(&["selected rows must be [batch, queries, query heads]", "selected [2, 4, 4]"], || {
        attend(q, kv, kv, &options)
    });
    let spans = Measure::Spans(Arc::new(some([2, 4, 1])));
    let options = AttentionOptions { statistics: spans, ..Default::default() };
    refuses(&["spans must be [batch, keys, sets]", "spans [2, 4, 1]"], || attend(q, kv, kv, &options));
}

#[test]
fn masks_of_other_shapes() {
    let hidden = |shape: [usize; 4]| some(shape).inner().greater_elem(0.0);
    for (mask, told) in [
        (Mask::none().with_lengths(&[3]), "one length per row of the batch; lengths [1], batch 2"),
        (Mask::causal().with_documents(&[0; 9]), "one document id per key; documents [9], batch 2, keys 5"),
        (Mask::turns(&[true; 8], 4), "one turn per key; turns [2, 4], batch 2, keys 5"),
        (Mask::turns(&[true; 10], 10), "one turn per key; turns [1, 10], batch 2, keys 5"),
        (
            Mask::causal().with_dense(hidden([2, 4, 3, 6])),
            "a dense mask must be [batch or 1, heads or 1, queries, keys]",
        ),
        (Mask::causal().with_documents(&[0; 10]), "query_offset 3, queries 3, keys 5"),
    ] {
        let options = AttentionOptions { mask: Some(&mask), query_offset: 3, ..Default::default() };
        refuses(&["mask", told], || attend([2, 4, 3, 6], [2, 2, 5, 6], [2, 2, 5, 6], &options));
    }
    refuses(&["7 tokens are no rows of 4"], || Mask::turns(&[true; 7], 4));
}

#[test]
fn attention_of_nothing() {
    for [batch, heads, queries, keys, width, value_width] in [
        [0, 4, 3, 5, 6, 6],
        [2, 0, 3, 5, 6, 6],
        [2, 4, 0, 5, 6, 6],
        [2, 4, 3, 0, 6, 6],
        [2, 4, 3, 5, 6, 0],
        [2, 4, 3, 5, 0, 6],
    ] {
        let mask = Mask::causal();
        let spans = Measure::Spans(Arc::new(some([batch, keys, 2]).inner()));
        for (biased, statistics) in
            [(false, Measure::Nothing), (true, Measure::Nothing), (false, Measure::Weights), (true, spans)]
        {
            let bias = biased.then(|| some([1, 1, queries, keys]));
            let options = AttentionOptions { mask: Some(&mask), bias, statistics, ..Default::default() };
            let (q, k) = (some([batch, heads, queries, width]), some([batch, heads / 2, keys, width]));
            let v = some([batch, heads / 2, keys, value_width]);
            let seen = attention(q.clone(), k.clone(), v.clone(), &options);
            assert_eq!(seen.statistics.is_some(), !matches!(options.statistics, Measure::Nothing));
            works(seen.hidden, [batch, heads, queries, value_width], &[of(&q), of(&k), of(&v)]);
        }
    }
}

/// All operations on sizes that are no multiples of anything, so that every remainder is walked through.
#[test]
fn awkward_shapes_are_read_to_their_ends_and_not_beyond() {
    let (batch, seq, heads, width, d_model) = (2, 131, 6, 5, 30);
    let x = some([batch, seq, d_model]);
    let into =
        SelectedRows::new(&(0..batch * seq * heads).map(|i| i % 3 != 1).collect::<Vec<_>>(), [batch, seq, heads]);
    let into = Arc::new(into);
    let q = linear_into_heads(rms_norm(x.clone(), some([d_model]), 1e-5), some([d_model, heads * width]), &into);
    let split = |x: Tensor<3>| x.reshape([batch, seq, heads, width]).swap_dims(1, 2);
    let k = split(linear(x.clone(), some([d_model, heads * width]), Some(some([heads * width]))));
    let turns: Vec<bool> = (0..batch * seq).map(|i| i / 7 % 2 == 0).collect();
    let mask = Mask::turns(&turns, seq);
    let options = AttentionOptions {
        mask: Some(&mask),
        selected: Some(into.clone()),
        statistics: Measure::Numbers,
        ..Default::default()
    };
    let seen = attention(split(q), k.clone(), k.clone(), &options).hidden;
    let less = subtract_noise(seen, some([1]), some([width]), Combination { ratio: 2, eps: 1e-5, factor: 0.5 });
    let joined = less.swap_dims(1, 2).reshape([batch, seq, 4 * width]);
    let gates = some([batch, seq, 4]);
    let four =
        Arc::new(SelectedRows::new(&(0..batch * seq * 4).map(|i| i % 4 != 2).collect::<Vec<_>>(), [batch, seq, 4]));
    let y = x.clone() + linear_out_of_heads(joined, gates, some([4 * width, d_model]), &four);
    let y = gated_mlp(y, some([d_model, 37]), some([d_model, 37]), some([37, d_model]));
    let tables = some([seq, 3]).inner();
    let turned = rope(some([batch, 2, seq, 6]), tables.clone(), tables, RopeLayout::Interleaved);
    let targets = Targets::new(&(0..batch * seq).map(|i| (i % 53) as i64 - 1).collect::<Vec<_>>());
    let loss = cross_entropy(y.reshape([batch * seq, d_model]), some([d_model, 53]), &targets);
    let sum = loss.sum + turned.sum().mul_scalar(0.01);
    assert!(numbers(&sum)[0].is_finite());
    let grad = x.grad(&sum.backward()).expect("a gradient");
    assert!(numbers(&grad).iter().all(|value| value.is_finite()) && numbers(&grad).iter().any(|&value| value != 0.0));
}
