"""The gates of the recurrent mixer, in NumPy, with gradients.

They are all h_t = alpha_t h_{t-1} + beta_t i_t x_t.

Sources: arXiv:2402.19427 section 2.4 (rg_lru), appendix A (the others), appendix B (cg_lru).
With p and q what a_gate and input_gate give, i = sigmoid(q), or 1 where a gate has no input gate:

    rg_lru   log alpha = -c softplus(a_param) sigmoid(p)    beta = sqrt(1 - alpha^2)
    lru      log alpha = -c softplus(a_param)               beta = sqrt(1 - alpha^2)
    gru      log alpha = -softplus(p)                       beta = 1 - alpha = sigmoid(p)
    mamba    log alpha = -A softplus(p)                     beta = (1 - alpha) / A

no_recurrence_gate and no_input_gate are rg_lru without that gate, lru is without both; c is
decay_exponent, A = softplus(a_param). Without normalize_input, beta = 1. At a document's start
alpha = 0 and beta = 1, for every gate.

cg_lru is rg_lru whose channels k and k + R / 2 are one complex channel, turned by theta r each
step: alpha = exp(-c softplus(a_param) r + j theta r), beta = sqrt(1 - |alpha|^2). The paper writes
(a exp(j theta))^(c r), with c in the phase too; the released code has it in the decay alone, as
here.

C: channels of the gates, R or R / 2.
"""

from typing import NamedTuple

import numpy as np

from implementations import reference
from implementations.config import GATES, ModelConfig
from implementations.reference import (
    Params,
    block_diagonal,
    block_diagonal_grad,
    sigmoid,
    softplus,
    under,
    within,
)


class Coefficients(NamedTuple):
    """Those of the recurrence at every step, and what their gradients need."""

    alpha_BTC: np.ndarray  # complex in cg_lru
    beta_BTC: np.ndarray
    i_BTC: np.ndarray
    log_alpha_BTC: np.ndarray  # of |alpha|, before a document's start makes it 0
    slowest_C: np.ndarray  # -log alpha = slowest * rate
    rate_BTC: np.ndarray


def rg_lru(
    config: ModelConfig,
    params: Params,
    x_BTR: np.ndarray,
    position_BT: np.ndarray,
    h0_BR: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Every state h_t, and the last one; at a document's start h_t = i_t x_t."""
    found = coefficients(config, params, x_BTR, position_BT)
    input_BTC = found.beta_BTC * found.i_BTC * paired(config, x_BTR)
    h_BTC, h_BC = reference.linear_scan(found.alpha_BTC, input_BTC, paired(config, h0_BR))
    return unpaired(config, h_BTC), unpaired(config, h_BC)


def rg_lru_grad(
    config: ModelConfig,
    params: Params,
    x_BTR: np.ndarray,
    position_BT: np.ndarray,
    h0_BR: np.ndarray,
    dh_BTR: np.ndarray,
    dh_last_BR: np.ndarray,
) -> tuple[Params, np.ndarray, np.ndarray]:
    """(gradients by name, dx, dh0)."""
    gate, found = GATES[config.gate], coefficients(config, params, x_BTR, position_BT)
    alpha_BTC, beta_BTC, i_BTC, log_alpha_BTC, slowest_C, rate_BTC = found
    is_start_BT1 = position_BT[..., None] == 0
    x_BTC = paired(config, x_BTR)
    # A gradient of z = u + jv is du + j dv; that of a product ab is conj(b) times its own, so the
    # real equations hold between conjugates.
    scan = (alpha_BTC, beta_BTC * i_BTC * x_BTC, paired(config, h0_BR))
    flows = (np.conj(paired(config, dh_BTR)), np.conj(paired(config, dh_last_BR)))
    dalpha_BTC, dinput_BTC, dh0_BC = map(np.conj, reference.linear_scan_grad(*scan, *flows))

    dwhole_BTC = np.real(dinput_BTC * np.conj(x_BTC))  # of beta * i
    dbeta_BTC = np.where(is_start_BT1, 0.0, dwhole_BTC * i_BTC)
    dturn_BTC = dalpha_BTC * np.conj(alpha_BTC)  # of log alpha, its phase the imaginary part
    dlog_alpha_BTC, dslowest_C = np.real(dturn_BTC), np.zeros_like(slowest_C)
    if gate.has_time_step:  # beta = (1 - alpha) / slowest
        dlog_alpha_BTC = dlog_alpha_BTC - np.exp(log_alpha_BTC) / slowest_C * dbeta_BTC
        dslowest_C = dslowest_C - np.sum(beta_BTC / slowest_C * dbeta_BTC, axis=(0, 1))
    elif config.normalize_input:
        dsquare_BTC = reference.bounded_sqrt_grad(-np.expm1(2 * log_alpha_BTC), dbeta_BTC)
        dlog_alpha_BTC = dlog_alpha_BTC - 2 * np.exp(2 * log_alpha_BTC) * dsquare_BTC

    grads: Params = {}
    dslowest_C = dslowest_C - np.sum(dlog_alpha_BTC * rate_BTC, axis=(0, 1))
    drate_BTC = -slowest_C * dlog_alpha_BTC
    if gate.has_a_param:
        exponent = 1.0 if gate.has_time_step else config.decay_exponent
        grads["a_param"] = exponent * dslowest_C * sigmoid(params["a_param"])
    if gate.is_complex:
        grads["theta"] = np.sum(np.imag(dturn_BTC) * rate_BTC, axis=(0, 1))
        drate_BTC = drate_BTC + params["theta"] * np.imag(dturn_BTC)
    dx_BTR = unpaired(config, dinput_BTC * beta_BTC * i_BTC)
    if gate.has_recurrence_gate:
        # d softplus(p) = sigmoid(p) = 1 - exp(-softplus(p))
        slope_BTC = -np.expm1(-rate_BTC) if gate.has_time_step else rate_BTC * (1 - rate_BTC)
        a_gate = within(params, "a_gate")
        da_gate, dx_a_BTR = block_diagonal_grad(a_gate, x_BTR, drate_BTC * slope_BTC)
        grads |= under(a_gate=da_gate)
        dx_BTR = dx_BTR + dx_a_BTR
    if gate.has_input_gate:
        di_BTC = dwhole_BTC * beta_BTC * i_BTC * (1 - i_BTC)
        input_gate = within(params, "input_gate")
        dinput_gate, dx_i_BTR = block_diagonal_grad(input_gate, x_BTR, di_BTC)
        grads |= under(input_gate=dinput_gate)
        dx_BTR = dx_BTR + dx_i_BTR
    return grads, dx_BTR, unpaired(config, dh0_BC)


def coefficients(
    config: ModelConfig, params: Params, x_BTR: np.ndarray, position_BT: np.ndarray
) -> Coefficients:
    gate = GATES[config.gate]
    is_start_BT1 = position_BT[..., None] == 0
    ones_BTC = np.ones((*x_BTR.shape[:2], config.d_gate), x_BTR.dtype)
    slowest_C, rate_BTC, i_BTC = ones_BTC[0, 0], ones_BTC, ones_BTC
    if gate.has_a_param:
        slowest_C = softplus(params["a_param"])
    if not gate.has_time_step:
        slowest_C = config.decay_exponent * slowest_C
    if gate.has_recurrence_gate:
        curve = softplus if gate.has_time_step else sigmoid
        rate_BTC = curve(block_diagonal(within(params, "a_gate"), x_BTR))
    if gate.has_input_gate:
        i_BTC = sigmoid(block_diagonal(within(params, "input_gate"), x_BTR))

    log_alpha_BTC = -slowest_C * rate_BTC
    alpha_BTC, beta_BTC = np.exp(log_alpha_BTC), ones_BTC
    if gate.is_complex:
        alpha_BTC = alpha_BTC * np.exp(1j * params["theta"] * rate_BTC)
    if gate.has_time_step:
        beta_BTC = -np.expm1(log_alpha_BTC) / slowest_C
    elif config.normalize_input:
        beta_BTC = reference.bounded_sqrt(-np.expm1(2 * log_alpha_BTC))  # exact near alpha = 1
    alpha_BTC = np.where(is_start_BT1, 0.0, alpha_BTC)
    beta_BTC = np.where(is_start_BT1, 1.0, beta_BTC)
    return Coefficients(alpha_BTC, beta_BTC, i_BTC, log_alpha_BTC, slowest_C, rate_BTC)


def paired(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """[..., C]: the channels, as complex ones where the gate is."""
    if not GATES[config.gate].is_complex:
        return x
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def unpaired(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """[..., R]: the inverse of paired."""
    if not GATES[config.gate].is_complex:
        return x
    return np.concatenate([x.real, x.imag], axis=-1)
