"Scores: what they read, from which optimizer, and what they say they need"
from functools import partial
import pytest, torch
from torch import nn
from fastai import optimizer as fo
from fastai.optimizer import OptimWrapper
from sparsefast import scores
from sparsefast.utils import attribute
from sparsefast.optim import *
from sparsefast.scores import *

to = torch.optim
def stepped(opt_f, n=3):
    "A parameter and its optimizer after `n` steps, and the gradients"
    p = nn.Parameter(torch.randn(3,4, dtype=torch.float64))
    opt,grads = opt_f([p]),[torch.randn(3,4, dtype=torch.float64) for _ in range(n)]
    for g in grads:
        p.grad = g.clone()
        opt.step()
    return p,opt,grads

def average(grads, beta, weight):
    v = torch.zeros_like(grads[0])
    for g in grads: v = beta*v + weight*g
    return v

def ratio(grads, b1, b2): return average(grads, b1, 1-b1).abs()/(average([g*g for g in grads], b2, 1-b2).sqrt()+1e-8)
def wrap(f): return lambda ps: OptimWrapper(ps, opt=f)

heavy_ball = lambda gs: average(gs, .9, 1.).abs()
CASES = dict(
    fastai_sgd      = (partial(fo.SGD, lr=.1, mom=.9), heavy_ball),
    fastai_adam     = (partial(fo.Adam, lr=.1), lambda gs: ratio(gs, .9, .99)),
    fastai_rmsprop  = (partial(fo.RMSProp, lr=.01, mom=.9), lambda gs: average(gs, .9, 1.).abs()/(average([g*g for g in gs], .99, .01).sqrt()+1e-8)),
    torch_sgd       = (partial(to.SGD, lr=.1, momentum=.9), heavy_ball),
    torch_nesterov  = (partial(to.SGD, lr=.1, momentum=.9, nesterov=True), heavy_ball),
    torch_adam      = (partial(to.Adam, lr=.1), lambda gs: ratio(gs, .9, .999)),
    torch_adamw     = (partial(to.AdamW, lr=.1, betas=(.8,.99)), lambda gs: ratio(gs, .8, .99)),
    wrapped_sgd     = (wrap(partial(to.SGD, lr=.1, momentum=.9)), heavy_ball),
    wrapped_adam    = (wrap(partial(to.Adam, lr=.1)), lambda gs: ratio(gs, .9, .999)),
    lookahead_sgd   = (lambda ps: fo.Lookahead(fo.SGD(ps, lr=.1, mom=.9)), heavy_ball),
    ranger          = (partial(fo.ranger, lr=.1), lambda gs: ratio(gs, .95, .99)))

@pytest.mark.parametrize('opt_f,expected', CASES.values(), ids=CASES)
def test_gradient_momentum(opt_f, expected):
    p,opt,grads = stepped(opt_f)
    score = gradient_momentum(p, opt=opt, mask=None, step=1, pct=0., generator=None)
    torch.testing.assert_close(score, expected(grads), rtol=1e-4, atol=1e-8)             # fastai's decay sums in another order
    assert (score>=0).all() and score.shape==p.shape and keeps_momentum(opt)

def test_torch_rmsprop_buffer_is_divided_already():
    p,opt,grads = stepped(partial(to.RMSprop, lr=.01, momentum=.9))
    assert torch.equal(gradient_momentum(p, opt=opt), opt.state[p]['momentum_buffer'].abs())

def test_momentum_is_that_of_the_parameter_asked_for():
    a,b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = to.SGD([dict(params=[a]), dict(params=[b])], lr=1, momentum=.9)
    a.grad,b.grad = torch.tensor([1.,-2.]),torch.tensor([3.,4.])
    opt.step()
    assert gradient_momentum(a, opt).tolist()==[1,2] and gradient_momentum(b, opt).tolist()==[3,4]

NO_MOMENTUM = dict(fastai_sgd=partial(fo.SGD, lr=.1), fastai_rmsprop=partial(fo.RMSProp, lr=.1), torch_sgd=partial(to.SGD, lr=.1), 
                   torch_rmsprop=partial(to.RMSprop, lr=.1), torch_adagrad=partial(to.Adagrad, lr=.1), wrapped_sgd=wrap(partial(to.SGD, lr=.1)))
@pytest.mark.parametrize('opt_f', NO_MOMENTUM.values(), ids=NO_MOMENTUM)
def test_no_momentum_says_what_to_set(opt_f):
    p,opt,_ = stepped(opt_f)
    assert not keeps_momentum(opt)
    with pytest.raises(ValueError, match=r'must keep momentum.*mom=0\.9.*momentum=0\.9'): gradient_momentum(p, opt=opt)

@pytest.mark.parametrize('opt_f', [c[0] for c in CASES.values()], ids=CASES)
def test_momentum_before_the_first_step(opt_f):
    p,opt,_ = stepped(opt_f, n=0)
    assert keeps_momentum(opt) and momentum(p, opt) is None and dict(opt_state(opt, p))=={}
    with pytest.raises(ValueError, match=r'must have stepped.*\(3, 4\)'): gradient_momentum(p, opt=opt)

@pytest.mark.parametrize('opt_f', [CASES[k][0] for k in ('torch_adam','wrapped_adam','fastai_adam','ranger')], ids=['torch','wrapped','fastai','ranger'])
def test_opt_state_is_the_state_itself(opt_f):
    p,opt,_ = stepped(opt_f)
    first = momentum(p, opt)[0]
    first.zero_()
    assert gradient_momentum(p, opt).count_nonzero()==0 and any(v is first for v in opt_state(opt, p).values())

def test_magnitudes():
    p = nn.Parameter(torch.tensor([[1.,-2.],[0.,-.5]], dtype=torch.bfloat16))
    assert weight_magnitude(p, opt=None, mask=None).tolist()==[[1,2],[0,.5]] and weight_magnitude(p).dtype==torch.bfloat16
    with pytest.raises(ValueError, match=r'\(2, 2\) has no gradient'): gradient_magnitude(p)
    p.grad = -p.detach()
    assert gradient_magnitude(p, step=3).tolist()==[[1,2],[0,.5]]
    for f in (weight_magnitude, gradient_magnitude): assert not f(p).requires_grad
    assert p.tolist()==[[1,-2],[0,-.5]]

def test_random_score():
    p,gen = nn.Parameter(torch.zeros(40,50)),lambda s: torch.Generator().manual_seed(s)
    a,before = random_score(p, generator=gen(1)),torch.get_rng_state()
    assert torch.equal(a, random_score(p, generator=gen(1), opt=None)) and not torch.equal(a, random_score(p, generator=gen(2)))
    assert torch.equal(before, torch.get_rng_state())                                    # the global generator is left alone
    assert a.shape==p.shape and 0<=a.min() and a.max()<1 and abs(a.mean()-.5)<.03 and a.unique().numel()>1990

def test_random_score_on_the_device():
    p,gen = torch.zeros(4, 5),lambda seed: torch.Generator().manual_seed(seed)
    a,before = random_score(p, generator=gen(1), on_device=True),torch.get_rng_state()
    assert torch.equal(a, random_score(p, generator=gen(1), on_device=True)) and not torch.equal(a, random_score(p, generator=gen(2), on_device=True))
    assert torch.equal(torch.get_rng_state(), before) and random_score(p.to('meta'), generator=None, on_device=True).is_meta

def test_what_scores_need():
    assert {f.__name__: reads(f) for f in (random_score, weight_magnitude, magnitude_no_empty_rows, gradient_magnitude, weight_and_gradient, gradient_momentum)} == dict(
        random_score=(), weight_magnitude=('weight',), magnitude_no_empty_rows=('weight',), gradient_magnitude=('gradient',), weight_and_gradient=('weight','gradient'), gradient_momentum=('momentum',))

def test_what_a_score_reads_that_says_nothing_or_says_it_in_the_earlier_words():
    def f(p, **kwargs): return p
    assert reads(f)==reads(partial(f))==('weight','gradient') and reads(None)==()
    f.needs_grad,f.needs_momentum = False,True
    assert reads(partial(f))==('weight','momentum')
    f.reads = ('gradient',)
    assert reads(partial(f))==('gradient',)

def test_inner_opt():
    p = nn.Parameter(torch.ones(2))
    sgd = fo.SGD([p], lr=.1)
    assert inner_opt(sgd) is sgd and inner_opt(fo.Lookahead(sgd)) is sgd
    w = OptimWrapper([p], opt=partial(to.SGD, lr=.1))
    assert isinstance(inner_opt(w), to.SGD)
    class Accelerated:                                                                   # accelerate's wrapper keeps it in `optimizer`
        def __init__(self, o): self.optimizer = o
    assert inner_opt(Accelerated(w)) is inner_opt(w)

BY_ROWS = [f for n,f in vars(scores).items() if attribute(f, 'by_rows', False)]
@pytest.mark.parametrize('f', BY_ROWS)
@pytest.mark.parametrize('shape', [(37, 29), (11, 5, 3, 3)])
def test_scores_by_rows(f, shape):
    "Some rows at a time, with one generator for all of them, these scores are what they are at once"
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    mask,opt = torch.rand(shape)<.3, torch.optim.SGD([p], lr=.1, momentum=.9)
    p.grad = torch.randn(shape)
    opt.step()
    whole = f(p, opt=opt, mask=mask, step=1, pct=0., generator=torch.Generator().manual_seed(1))
    chance,parts = torch.Generator().manual_seed(1),[]
    for rows in (slice(0, 1), slice(1, 6), slice(6, 11), slice(11, None)):
        q = nn.Parameter(p.detach()[rows])
        q.grad,opt.state[q] = p.grad[rows], dict(momentum_buffer=opt.state[p]['momentum_buffer'][rows])
        parts.append(f(q, opt=opt, mask=mask[rows], step=1, pct=0., generator=chance))
    assert torch.cat(parts).equal(whole)

def test_which_scores_go_by_rows():
    assert {f.__name__ for f in BY_ROWS}=={'random_score', 'weight_magnitude', 'random_elsewhere', 'magnitude_no_empty_rows', 'gradient_magnitude', 'weight_and_gradient', 'gradient_momentum', 'sensitivity', 'movement'}

def test_no_empty_rows():
    "The strongest active weight of each row, and no other, is out of reach: plain loops agree, in any memory format"
    for p in (torch.randn(5,7), torch.randn(4,3,2,2).to(memory_format=torch.channels_last), torch.randn(6,1), torch.randn(3,4,dtype=torch.bfloat16)):
        mask = torch.rand(p.shape)<.4
        score,before = magnitude_no_empty_rows(p, mask=mask, opt=None, step=1, pct=0., generator=None), p.clone()
        assert score.shape==p.shape and score.dtype==p.dtype and torch.equal(p, before)
        for w,k,s in zip(p, mask, score):
            active = [i for i,on in enumerate(k.flatten().tolist()) if on]
            if not active: continue
            best = max(active, key=lambda i: w.flatten()[i].abs())
            for i in active: assert s.flatten()[i] == (float('inf') if i==best else w.flatten()[i].abs())

def test_no_empty_rows_protects_one_of_equal_weights():
    zeros = magnitude_no_empty_rows(torch.zeros(2,3), mask=torch.tensor([[False,True,True], [True,True,True]]))
    assert zeros.isinf().nonzero().tolist()==[[0,1], [1,0]]
    assert magnitude_no_empty_rows(torch.ones(2,2)).isinf().sum(1).tolist()==[1,1]
    assert magnitude_no_empty_rows(torch.zeros(0,3)).shape==(0,3) and magnitude_no_empty_rows(torch.zeros(3,0)).shape==(3,0)

# ------------------------------------------------------------ relative importance, sensitivity, and scores made of scores
def gen(seed=0): return torch.Generator().manual_seed(seed)

def test_relative_importance():
    w = torch.tensor([[4,-1,0,2], [0,3,-2,0], [1,0,0,-.5], [0,0,0,0]])
    want = torch.tensor([[1.371429,.392857,0,1.085714], [0,1.35,1.4,0], [.866667,0,0,.533333], [0,0,0,0]])
    torch.testing.assert_close(relative_importance(w), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(relative_importance(w.t()), want.t(), rtol=0, atol=1e-6)
    assert torch.equal(relative_importance(w[:,:,None,None]), relative_importance(w)[:,:,None,None])
    assert relative_importance(w.bfloat16()).dtype==torch.float32 and torch.equal(relative_importance(w+9*(w==0), mask=w!=0), relative_importance(w))

def test_sensitivity_and_movement():
    p = nn.Parameter(torch.tensor([[.5,-.1,.7], [.2,-.9,.05]]))
    for f in (sensitivity, movement):
        with pytest.raises(ValueError, match='no gradient'): f(p)
        assert reads(f)==('weight', 'gradient') and f.by_rows
    p.grad = torch.tensor([[.1,-2,.01], [.3,.02,4]])
    torch.testing.assert_close(sensitivity(p), torch.tensor([[.05,.2,.007], [.06,.018,.2]]))
    torch.testing.assert_close(movement(p), torch.tensor([[-.05,-.2,-.007], [-.06,.018,-.2]]))

INCLUDED = {1.: [.234524, .441270, .608333, .715873], 3.: [.032346, .252619, .776206, .938829]}
PAIRS = {(0,1): .047222, (0,2): .076190, (0,3): .111111, (1,2): .160714, (1,3): .233333, (2,3): .371429}

def draws(gamma, n=20_000, dtype=torch.float32, **kwargs):
    q = torch.tensor([1., 2., 3., 4.], dtype=dtype).expand(n, 4)
    return sampled(weight_magnitude, gamma)(q, generator=gen(), **kwargs).topk(2).indices.sort(1).values

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('gamma', [1., 3.])
def test_draws_without_replacement_have_the_law(gamma, dtype):
    n = 20_000
    got = draws(gamma, n, dtype).flatten().bincount(minlength=4)/n
    want = torch.tensor(INCLUDED[gamma])
    assert ((got-want).abs()<4*(want*(1-want)/n).sqrt()).all()

def test_pairs_have_the_law():
    n = 20_000
    got = draws(1., n)
    counts = torch.tensor([(got==torch.tensor(pair)).all(1).sum() for pair in PAIRS]).double()
    want = n*torch.tensor(list(PAIRS.values())).double()
    assert ((counts-want)**2/want).sum()<20.5                                               # chi-square of five degrees of freedom: one in a thousand

def test_exponent_may_follow_training():
    ramp = lambda pct: 1+2*pct
    assert torch.equal(draws(ramp, pct=1.), draws(3.)) and torch.equal(draws(ramp, pct=0.), draws(1.)) and not torch.equal(draws(ramp, pct=1.), draws(1.))

def test_zero_is_drawn_last():
    q = torch.tensor([0., 1., -1., 2., 0.])
    for gamma in (0., 1., 5.):
        score = sampled(lambda p, **kwargs: p, gamma)(q, generator=gen())
        assert score.dtype==torch.float64 and score.isneginf().tolist()==[True, False, True, False, True]

def test_not_returning():
    mask = torch.tensor([[True, False], [False, True]])
    for f in (random_score, weight_magnitude, lambda p, **kwargs: p.int()):
        score = not_returning(f)(torch.tensor([[3., 2.], [1., 0.]]), mask=mask, generator=gen())
        assert score[mask].isneginf().all() and score[~mask].isfinite().all()
    both = sampled(not_returning(weight_magnitude)), not_returning(sampled(weight_magnitude))
    a,b = (f(torch.tensor([[3., 2.], [1., 4.]]), mask=mask, generator=gen()) for f in both)
    assert torch.equal(a, b)

@pytest.mark.parametrize('wrap', [sampled, not_returning, in_subset])
@pytest.mark.parametrize('f', [random_score, weight_magnitude, gradient_magnitude, relative_importance, partial(weight_and_gradient, scale=2.)])
def test_a_wrapped_score_says_what_the_score_says(wrap, f):
    g = wrap(f)
    assert reads(g)==reads(f) and attribute(g, 'by_rows')==bool(attribute(f, 'by_rows', False)) and reads(partial(g))==reads(f)

@pytest.mark.parametrize('wrap', [sampled, not_returning])
def test_rows_of_a_wrapped_score_are_those_of_the_whole(wrap):
    "Drawn one after another by one generator, as compressed layers do"
    p,mask = torch.rand(30, 17),torch.rand(30, 17)<.5
    whole,g = wrap(random_score)(p, mask=mask, generator=gen()),gen()
    if wrap is not_returning: assert torch.equal(torch.cat([wrap(random_score)(p[i:i+7], mask=mask[i:i+7], generator=g) for i in range(0, 30, 7)]), whole)
    whole,g = wrap(weight_magnitude)(p, mask=mask, generator=gen()),gen()
    assert torch.equal(torch.cat([wrap(weight_magnitude)(p[i:i+7], mask=mask[i:i+7], generator=g) for i in range(0, 30, 7)]), whole)
