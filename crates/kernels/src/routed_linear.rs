//! Linear maps into and out of heads that take part at some positions only (Mixture-of-Head attention, Jin et al. 2024,
//! arXiv 2410.11842), so that the positions at which a head is not selected cost nothing.
//!
//! `maps.rs` has both maps and their backwards for the CPU.

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::shapes::assert_shapes;
use crate::weight::as_weight;
use crate::{SelectedRows, cpu, in_type, linear};

mod maps;

#[cfg(test)]
mod tests;

/// `x · weight` for the selected heads of each position, zero for the others.
///
/// # Shapes
/// - x: `[batch, seq, d_model]`, weight: `[d_model, heads * width]`
/// - output: `[batch, seq, heads * width]`
///
/// # Panics
/// If the shapes are others.
pub fn linear_into_heads(x: Tensor<3>, weight: Tensor<2>, selected: &Arc<SelectedRows>) -> Tensor<3> {
    let ([batch, seq, d_model], [rows, channels]) = (x.dims(), weight.dims());
    let [selected_batch, selected_seq, heads] = selected.shape();
    assert_shapes!("linear_into_heads", x, weight, selected;
        "selected rows must be [batch, seq, heads]": [selected_batch, selected_seq] == [batch, seq],
        "weight must have a row per channel of x": rows == d_model,
        "the columns of weight must be heads of one width": channels.is_multiple_of(heads),
    );
    if channels == 0 {
        return linear(x, weight, None);
    }
    if cpu::fuses(&x) {
        let parts = (x.into_dispatch(), as_weight(weight).into_dispatch());
        return Tensor::from_dispatch(Dispatch::into_heads(parts.0, parts.1, selected.clone()));
    }
    into_heads_plain(x, weight, selected)
}

/// The sum over the selected heads of each position of `gate · head · (the head's rows of the weight)`.
///
/// # Shapes
/// - heads: `[batch, seq, heads * width]`, gates: `[batch, seq, heads]`, weight: `[heads * width, d_model]`
/// - output: `[batch, seq, d_model]`
///
/// # Panics
/// If the shapes are others.
pub fn linear_out_of_heads(
    heads: Tensor<3>,
    gates: Tensor<3>,
    weight: Tensor<2>,
    selected: &Arc<SelectedRows>,
) -> Tensor<3> {
    let ([batch, seq, channels], n_heads) = (heads.dims(), gates.dims()[2]);
    assert_shapes!("linear_out_of_heads", heads, gates, weight, selected;
        "gates must be [batch, seq, heads]": gates.dims() == [batch, seq, n_heads],
        "selected rows must be [batch, seq, heads]": selected.shape() == [batch, seq, n_heads],
        "the channels of heads must be heads of one width": channels.is_multiple_of(n_heads),
        "weight must have a row per channel of heads": weight.dims()[0] == channels,
    );
    if channels == 0 {
        return linear(heads, weight, None);
    }
    if cpu::fuses(&heads) {
        let [gates, weight] = [in_type(gates, DType::F32).into_dispatch(), as_weight(weight).into_dispatch()];
        let parts = (heads.into_dispatch(), gates, weight);
        return Tensor::from_dispatch(Dispatch::out_of_heads(parts.0, parts.1, parts.2, selected.clone()));
    }
    out_of_heads_plain(heads, gates, weight, selected)
}

fn into_heads_plain(x: Tensor<3>, weight: Tensor<2>, selected: &Arc<SelectedRows>) -> Tensor<3> {
    zero_where_unselected(linear(x, weight, None), selected)
}

fn out_of_heads_plain(
    heads: Tensor<3>,
    gates: Tensor<3>,
    weight: Tensor<2>,
    selected: &Arc<SelectedRows>,
) -> Tensor<3> {
    let [batch, seq, channels] = heads.dims();
    let n_heads = gates.dims()[2];
    let gates = in_type(gates, heads.dtype());
    let by_head = heads.reshape([batch, seq, n_heads, channels / n_heads]) * gates.unsqueeze_dim::<4>(3);
    linear(zero_where_unselected(by_head.reshape([batch, seq, channels]), selected), weight, None)
}

/// `[batch, seq, heads * width]`
fn zero_where_unselected(x: Tensor<3>, selected: &SelectedRows) -> Tensor<3> {
    let [batch, seq, channels] = x.dims();
    let heads = selected.shape()[2];
    let full = [batch, seq, heads, channels / heads];
    let hidden = selected.hidden(&x.device()).swap_dims(1, 2).expand(full); // from [batch, heads, seq, 1]
    x.reshape(full).mask_fill(hidden, 0.0).reshape([batch, seq, channels])
}

type Selected = Arc<SelectedRows>;

fused!(IntoHeads: into_heads(x, weight; of: Selected), run_into_heads, into_heads_backward);
fused!(OutOfHeads: out_of_heads(heads, gates, weight; of: Selected), run_out_of_heads, out_of_heads_backward);

fn run_into_heads([x, weight]: [FlexTensor; 2], selected: Selected) -> (FlexTensor, ([FlexTensor; 2], Selected)) {
    let inputs = [x.to_contiguous(), cpu::not_backwards(weight)];
    (maps::into_heads(&inputs[0], &inputs[1], &selected), (inputs, selected))
}

fn run_out_of_heads(
    [heads, gates, weight]: [FlexTensor; 3],
    selected: Selected,
) -> (FlexTensor, ([FlexTensor; 3], Selected)) {
    let inputs = [heads.to_contiguous(), gates.to_contiguous(), cpu::not_backwards(weight)];
    (maps::out_of_heads(inputs.each_ref(), &selected), (inputs, selected))
}

fn into_heads_backward(
    ([x, weight], selected): ([FlexTensor; 2], Selected),
    y_grad: FlexTensor,
    [of_x, of_weight]: Wanted<2>,
) -> InputGrads<Flex, 2> {
    let y_grad = y_grad.to_contiguous();
    [
        of_x.then(|| maps::into_heads_back_to_x(&weight, &y_grad, &selected)),
        of_weight.then(|| maps::into_heads_back_to_weight(&x, &y_grad, &selected)),
    ]
}

fn out_of_heads_backward(
    (inputs, selected): ([FlexTensor; 3], Selected),
    y_grad: FlexTensor,
    [of_heads, of_gates, of_weight]: Wanted<3>,
) -> InputGrads<Flex, 3> {
    let y_grad = y_grad.to_contiguous();
    let [heads_grad, gates_grad] =
        maps::out_of_heads_back_to_heads(inputs.each_ref(), &y_grad, &selected, [of_heads, of_gates]);
    let [heads, gates, _] = &inputs;
    let weight_grad = of_weight.then(|| maps::out_of_heads_back_to_weight([heads, gates], &y_grad, &selected));
    [heads_grad, gates_grad, weight_grad]
}
