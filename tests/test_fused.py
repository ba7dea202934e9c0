"""Fused time steps against the equations: in Triton's interpreter, and by a stand-in for the GPU where torch decides.

Run as a program, this file compares the kernels with the equations; the interpreter is on for whole processes alone.
"""

import copy
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_regnet_reg import equations, fused

GATES = {'convgru': 3, 'convlstm': 4}
LAST, FIRST = torch.channels_last, torch.contiguous_format
NO_TRITON = importlib.util.find_spec('triton') is None

needs_triton = pytest.mark.skipif(NO_TRITON, reason='Triton is not installed')


def step_inputs(cell, shape, later, dtype=torch.float32, memory_format=LAST, seed=0):
    """X, H, C, K_x, K_h and b, which take gradients; without H and C for the first step."""
    generator = torch.Generator().manual_seed(seed)
    G, N = GATES[cell], shape[1]
    states = (2 if cell == 'convlstm' else 1) if later else 0

    def new(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    maps = [new(*shape).contiguous(memory_format=memory_format) for _ in range(1 + states)] + [None, None]
    W = [new(G, N, 1, 3, 3, scale=0.4), new(G, N, 1, 3, 3, scale=0.4), new(G, N)]
    return [None if t is None else t.requires_grad_() for t in maps[:3] + W]


def outputs_and_gradients(step, inputs):
    """The new H and C, and the gradients of what was given by a fixed random combination of them."""
    X, H, C, *W = inputs
    outputs = [o for o in step(X, H, C, equations.kernels(*(K.flatten(0, 1) for K in W), len(W[0]))) if o is not None]
    generator = torch.Generator().manual_seed(1)
    total = sum((o.double() * torch.randn(o.shape, generator=generator).to(o.device)).sum() for o in outputs)
    return outputs + list(torch.autograd.grad(total, [t for t in inputs if t is not None], allow_unused=True))


def compare_in_interpreter(cell):
    """Every kernel of the cell against the equations in float64."""
    from timm_regnet_reg.fused import operators

    cases = [
        (torch.float32, LAST, (2, 5, 7, 5), 1e-6),
        (torch.float32, FIRST, (2, 5, 2, 4), 1e-6),
        (torch.bfloat16, LAST, (1, 3, 3, 4), 2e-2),
        (torch.float16, LAST, (1, 2, 4, 3), 4e-3),
    ]
    if cell == 'convgru':  # two blocks of channels, in code that the cells share
        cases.append((torch.float32, LAST, (1, 66, 1, 2), 1e-6))
    worst = 0.0
    for later in (False, True):
        for dtype, memory_format, shape, tolerance in cases if later else cases[:2]:
            inputs = step_inputs(cell, shape, later, dtype, memory_format)
            if memory_format is FIRST and later:  # copied, as they are in neither format
                inputs = [None if t is None else t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
            exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
            step = lambda X, H, C, W: operators.FusedStep.apply(cell, X, H, C, *W[:3])  # noqa: E731
            found, right = outputs_and_gradients(step, inputs), outputs_and_gradients(getattr(equations, cell), exact)
            for k, (actual, expected) in enumerate(zip(found, right, strict=True)):
                what = f'{cell} later={later} {dtype} {shape} output or gradient {k}'
                if expected is None:  # of K_h in the first step
                    assert actual is None, what
                    continue
                assert actual.dtype == dtype, what
                error = ((actual.double() - expected).norm() / expected.norm()).item()
                assert error <= tolerance, f'{what}: off by {error:.1e}'
                worst = max(worst, error / tolerance)

    # what torch asks of an operator: nothing changed that is given, and outputs as the function of shapes has them
    for later, memory_format in ((False, FIRST), (True, LAST)):
        inputs = step_inputs(cell, (1, 2, 2, 3), later, memory_format=memory_format)
        inputs = [cell] + [None if t is None else t.detach() for t in inputs]
        for operator, args in (('step', inputs), ('step_backward', [*inputs, inputs[1], inputs[3]])):
            operator = getattr(torch.ops.timm_regnet_reg, operator)
            torch.library.opcheck(operator, args, test_utils=('test_schema', 'test_faketensor')[1 - later :])
        inputs[1].mul_(1e4)
        assert all(t.isfinite().all() for t in torch.ops.timm_regnet_reg.step(*inputs)), 'saturated gates overflow'
    print(f'{cell}: at most {worst:.2f} of the tolerance')


@needs_triton
def test_kernels_compute_the_equations_and_their_gradients():
    env = {**os.environ, 'TRITON_INTERPRET': '1'}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count('of the tolerance') == len(GATES), run.stdout + run.stderr


@needs_triton
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize('cell', GATES)
def test_kernels_fit_into_registers(cell, arch, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_regnet_reg.fused import kernels, launches

    cuobjdump = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
    if not os.path.exists(cuobjdump):
        pytest.skip(f'no {cuobjdump} to read registers and stack with')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'cache'))
    launched = {}

    def record(kernel, *args, **options):
        launched[kernel, tuple(a is None for a in args), tuple(sorted(options.items()))] = args

    for name in kernels.__all__:
        launch = functools.partial(record, getattr(kernels, name))
        monkeypatch.setattr(kernels, name, defaultdict(lambda launch=launch: launch))  # kernel[any grid]
    for later in (False, True):
        inputs = step_inputs(cell, (8, 64, 16, 16), later, torch.bfloat16)
        launches.step(cell, *inputs)
        launches.step_backward(cell, *inputs, inputs[0], inputs[2])
    pointers = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}
    for (kernel, _, options), args in launched.items():
        constants = dict(options)
        warps = constants.pop('num_warps', 4)
        signature, attributes = dict.fromkeys(kernel.arg_names, 'constexpr'), {}
        for k, (name, arg) in enumerate(zip(kernel.arg_names, args)):
            if arg is None or (isinstance(arg, int) and arg == 1):  # as Triton's launcher has it
                constants[name] = arg
                continue
            signature[name] = pointers[arg.dtype] if isinstance(arg, torch.Tensor) else 'i32'
            if isinstance(arg, torch.Tensor) or arg % 16 == 0:
                attributes[(k,)] = [['tt.divisibility', 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget('cuda', arch, 32), options={'num_warps': warps})
        binary = tmp_path / 'kernel.cubin'
        binary.write_bytes(compiled.asm['cubin'])
        command = [cuobjdump, '--dump-resource-usage', str(binary)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack = (int(re.search(rf'{what}:(\d+)', usage)[1]) for what in ('REG', 'STACK'))
        print(f'{kernel.fn.__name__}, H {later}, {options}: {registers} registers, {stack} bytes of stack')
        assert stack == 0 and registers <= 192, f'{kernel.fn.__name__} {options}: {usage}'
    assert len(launched) > 5


# who computes a time step


@pytest.fixture
def stand_in(monkeypatch):
    """Fused steps on the CPU, by operators that compute the equations; the operators' calls, one by one."""
    fused.set_fused()
    from timm_regnet_reg.fused import operators

    calls = []

    def step(cell, *inputs):
        calls.append('step')
        return list(operators.equation(cell, *inputs))

    def step_backward(cell, *inputs):
        calls.append('step_backward')
        new = operators.step_backward_fake(cell, *inputs)
        return [n.copy_(g) for n, g in zip(new, operators.step_vjp(cell, *inputs), strict=True)]

    library = torch.library.Library('timm_regnet_reg', 'IMPL')
    library.impl('step', step, 'CPU')
    library.impl('step_backward', step_backward, 'CPU')
    monkeypatch.setattr(fused, 'DEVICE', 'cpu')
    yield calls
    fused.set_fused(False)
    library._destroy()


STEPS = 9  # of RegNet-20


def network(name='regnet_reg_resnet20_convlstm'):
    """With regulators and fusions that aren't at their neutral start, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.04)
    return model.eval()


def images(batch=2, size=12):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def gradients(model, x):
    """The logits, and the gradients of the parameters by a sum of their squares."""
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def by_equations(function, *args):
    """What it gives without fused steps."""
    fused.set_fused(False)
    expected = function(*args)
    fused.set_fused()
    return expected


def assert_same(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert not e.numel() or (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


@pytest.mark.parametrize('cell', GATES)
def test_fused_steps_train_as_the_equations_do(cell, stand_in):
    model, x = network(f'regnet_reg_resnet20_{cell}'), images()
    expected = by_equations(gradients, model, x)
    assert not stand_in, 'set_fused(False) did not turn the operators off'

    for how in ('eager', 'checkpointed', 'compiled')[: 3 if cell == 'convlstm' else 2]:
        stand_in.clear()
        model.set_grad_checkpointing(how == 'checkpointed')
        run = torch.compile(model, backend='aot_eager', fullgraph=True) if how == 'compiled' else model
        assert_same(gradients(run, x), expected)
        assert stand_in.count('step') >= STEPS and stand_in.count('step_backward') == STEPS, how
        torch.compiler.reset()

    with torch.inference_mode():
        assert_same([model(x)], expected[:1])


def test_fused_steps_know_autocast(stand_in):
    model, x = network(), images()

    def amp():
        with torch.autocast('cpu', torch.bfloat16):
            return gradients(model, x)

    assert_same(amp(), by_equations(amp), 1e-2)
    assert stand_in.count('step_backward') == STEPS


@pytest.mark.parametrize('later', [False, True])
@pytest.mark.parametrize('cell', GATES)
def test_fused_steps_have_the_operations_of_the_equations(cell, later):
    from timm_regnet_reg.fused import operators

    inputs = step_inputs(cell, (2, 4, 5, 3), later)
    X, H, C, *W = inputs = [None if t is None else t.detach().to('meta').requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        getattr(equations, cell)(X, H, C, equations.kernels(*(K.flatten(0, 1) for K in W), len(W[0])))
        expected = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        outputs = operators.FusedStep.apply(cell, X, H, C, *W)
        assert counter.get_total_flops() == expected > 0
        torch.autograd.grad(outputs, [t for t in inputs if t is not None], outputs, allow_unused=True)
        assert counter.get_total_flops() == 3 * expected


def test_equations_compute_what_the_kernels_cannot(stand_in):
    model, rnn, x = network(), network('regnet_reg_resnet20_convrnn'), images()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = by_equations(gradients, model, x)
    X, W = torch.ones(1, 16, 2, 3), model.layer1.regulator()

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def forward_mode():
        return torch.func.jvp(model, (x,), (torch.ones_like(x),))

    def per_sample():
        sample = torch.func.grad(lambda parameters, x: loss(parameters, x[None]))
        return [g.sum(0) for g in torch.vmap(sample, (None, 0))(parameters, x).values()]

    def of_double(model=copy.deepcopy(model).double()):
        return [model(x.double())]

    cases = {
        'forward mode': (forward_mode, by_equations(forward_mode)),
        'per-sample gradients': (per_sample, expected[1:]),
        'a ConvRNN': (lambda: gradients(rnn, x), by_equations(gradients, rnn, x)),
        'float64': (of_double, by_equations(of_double)),
        'a memory alone': (lambda: fused.convlstm(X, None, X, W), equations.convlstm(X, None, X, W)),
        'an empty batch': (lambda: [model(x[:0])], [torch.empty(0, 7)]),
        'torch.export': (lambda: [torch.export.export(model, (x,)).module()(x)], expected[:1]),
        'TorchScript': (lambda: [torch.jit.script(model)(x)], expected[:1]),
        'a trace': (lambda: [torch.jit.trace(model, x, check_trace=False)(x)], expected[:1]),
        'torch.fx': (lambda: [torch.fx.symbolic_trace(model)(x)], expected[:1]),
    }
    for name, (function, expected) in cases.items():
        assert_same(function(), expected)
        assert not stand_in, f'{name} used {stand_in}'
    large = torch.empty(()).expand(2, 2**28)  # of four gates more elements than 32 bits count
    assert fused.fuses(large[:1], None, None, [x]) and not fused.fuses(large, None, None, [x])


def test_gradients_have_gradients(stand_in):
    model, x = network('regnet_reg_resnet20_convgru'), images().requires_grad_()

    def penalty():
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *model.parameters()])

    assert_same(penalty(), by_equations(penalty), 1e-4)
    X, W = torch.ones(1, 16, 2, 3).requires_grad_(), network().layer1.regulator()

    def of_memory_alone():
        return torch.autograd.grad(fused.convlstm(X, None, None, W)[1].sum(), X)

    assert_same(of_memory_alone(), by_equations(of_memory_alone))
    assert stand_in


def test_fused_steps_need_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.warns(UserWarning, match='Triton is not installed'):
        importlib.import_module('timm_regnet_reg.fused.enable')
    monkeypatch.setattr(fused, 'DEVICE', 'cpu')
    X, H, C, *W = step_inputs('convgru', (1, 2, 3, 3), True)
    assert not fused.fuses(X, H, C, W) and not fused.available()


if __name__ == '__main__':
    assert not fused._enabled, 'on when imported'
    assert 'timm_regnet_reg.fused.operators' not in sys.modules, 'imported before it is turned on'
    from timm_regnet_reg.fused import launches

    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    for name in ('step', 'step_backward'):
        torch.library.impl(f'timm_regnet_reg::{name}', 'CPU')(getattr(launches, name))
    # several programs each way, of more elements than on a GPU, as each takes the interpreter long
    launches.TILE, launches.SUMS_TILE, launches.SUMS_PROGRAMS, launches.SUMS_PARTS = 256, 128, 3, 2
    for cell in GATES:
        compare_in_interpreter(cell)
