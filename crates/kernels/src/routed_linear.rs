//! Linear maps into and out of heads that take part at some positions only (Mixture-of-Head attention, Jin et al. 2024,
//! arXiv 2410.11842), so that the positions at which a head rests cost nothing.
//!
//! `maps.rs` has both maps and their backwards for the CPU.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::{ActiveRows, cpu, linear};

mod maps;

#[cfg(test)]
mod tests;

/// `x · weight` for the active heads of each position, zero for the others.
///
/// # Shapes
/// - x: `[batch, seq, d_model]`, weight: `[d_model, heads * width]`
/// - output: `[batch, seq, heads * width]`
pub fn linear_into_heads(x: Tensor<3>, weight: Tensor<2>, active: &Arc<ActiveRows>) -> Tensor<3> {
    let [batch, seq, _] = x.dims();
    assert_eq!(active.shape()[..2], [batch, seq], "active rows of another call");
    if cpu::fuses(&x) {
        let parts = (x.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(Dispatch::into_heads(parts.0, parts.1, active.clone()));
    }
    into_heads_plain(x, weight, active)
}

/// The sum over the active heads of each position of `gate · head · (the head's rows of the weight)`.
///
/// # Shapes
/// - heads: `[batch, seq, heads * width]`, gates: `[batch, seq, heads]`, weight: `[heads * width, d_model]`
/// - output: `[batch, seq, d_model]`
pub fn linear_out_of_heads(
    heads: Tensor<3>,
    gates: Tensor<3>,
    weight: Tensor<2>,
    active: &Arc<ActiveRows>,
) -> Tensor<3> {
    assert_eq!(active.shape(), gates.dims(), "active rows of another call");
    if cpu::fuses(&heads) {
        let parts = (heads.into_dispatch(), gates.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(Dispatch::out_of_heads(parts.0, parts.1, parts.2, active.clone()));
    }
    out_of_heads_plain(heads, gates, weight, active)
}

fn into_heads_plain(x: Tensor<3>, weight: Tensor<2>, active: &Arc<ActiveRows>) -> Tensor<3> {
    zero_where_inactive(linear(x, weight, None), active)
}

fn out_of_heads_plain(heads: Tensor<3>, gates: Tensor<3>, weight: Tensor<2>, active: &Arc<ActiveRows>) -> Tensor<3> {
    let [batch, seq, channels] = heads.dims();
    let n_heads = gates.dims()[2];
    let by_head = heads.reshape([batch, seq, n_heads, channels / n_heads]) * gates.unsqueeze_dim::<4>(3);
    linear(zero_where_inactive(by_head.reshape([batch, seq, channels]), active), weight, None)
}

/// `[batch, seq, heads * width]`
fn zero_where_inactive(x: Tensor<3>, active: &ActiveRows) -> Tensor<3> {
    let [batch, seq, channels] = x.dims();
    let heads = active.shape()[2];
    let full = [batch, seq, heads, channels / heads];
    let hidden = active.hidden(&x.device()).swap_dims(1, 2).expand(full); // from [batch, heads, seq, 1]
    x.reshape(full).mask_fill(hidden, 0.0).reshape([batch, seq, channels])
}

#[backend_extension(Flex, Autodiff)]
trait RoutedLinear: Backend {
    fn into_heads(x: FloatTensor<Self>, weight: FloatTensor<Self>, active: Arc<ActiveRows>) -> FloatTensor<Self>;

    fn out_of_heads(
        heads: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        active: Arc<ActiveRows>,
    ) -> FloatTensor<Self>;
}

impl RoutedLinear for Flex {
    fn into_heads(x: FlexTensor, weight: FlexTensor, active: Arc<ActiveRows>) -> FlexTensor {
        maps::into_heads(&x.to_contiguous(), &weight, &active)
    }

    fn out_of_heads(heads: FlexTensor, gates: FlexTensor, weight: FlexTensor, active: Arc<ActiveRows>) -> FlexTensor {
        maps::out_of_heads([&heads.to_contiguous(), &gates.to_contiguous(), &weight], &active)
    }
}

impl<C: CheckpointStrategy> RoutedLinear for Autodiff<Flex, C> {
    fn into_heads(x: FloatTensor<Self>, weight: FloatTensor<Self>, active: Arc<ActiveRows>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 2> for Step {
            type State = ([FlexTensor; 2], Arc<ActiveRows>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = grads.consume::<Flex>(&ops.node).to_contiguous();
                let (([x, weight], active), [x_node, weight_node]) = (ops.state, ops.parents);
                if let Some(node) = x_node {
                    grads.register::<Flex>(node.id, maps::into_heads_back_to_x(&weight, &y_grad, &active));
                }
                if let Some(node) = weight_node {
                    grads.register::<Flex>(node.id, maps::into_heads_back_to_weight(&x, &y_grad, &active));
                }
            }
        }
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let x = x.to_contiguous();
        let y = maps::into_heads(&x, &weight, &active);
        match Step.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(([x, weight], active), y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }

    fn out_of_heads(
        heads: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        active: Arc<ActiveRows>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 3> for Step {
            type State = ([FlexTensor; 3], Arc<ActiveRows>);

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = grads.consume::<Flex>(&ops.node).to_contiguous();
                let ([heads, gates, weight], active) = ops.state;
                let [heads_node, gates_node, weight_node] = ops.parents;
                if heads_node.is_some() || gates_node.is_some() {
                    let input_grads = maps::out_of_heads_back_to_heads([&heads, &gates, &weight], &y_grad, &active);
                    for (parent, grad) in [heads_node, gates_node].into_iter().zip(input_grads) {
                        if let Some(node) = parent {
                            grads.register::<Flex>(node.id, grad);
                        }
                    }
                }
                if let Some(node) = weight_node {
                    grads.register::<Flex>(
                        node.id,
                        maps::out_of_heads_back_to_weight([&heads, &gates], &y_grad, &active),
                    );
                }
            }
        }
        let (heads, heads_node) = heads.into_parts();
        let ((gates, gates_node), (weight, weight_node)) = (gates.into_parts(), weight.into_parts());
        let (heads, gates) = (heads.to_contiguous(), gates.to_contiguous());
        let y = maps::out_of_heads([&heads, &gates, &weight], &active);
        match Step.prepare::<C>([heads_node, gates_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(([heads, gates, weight], active), y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }
}
