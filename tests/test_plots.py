"Pictures show what they should: lengths, counts, positions; they draw where they are told, and refuse what they cannot draw"
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from torch import nn
from helpers import *
from sparsefast.core import *
from sparsefast.plots import *

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def model():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    sparsify_model(m, .6, exclude=-1)
    return m

def drawn(ax): ax.figure.canvas.draw()

def test_sparsity():
    ax = plot_sparsity(m := model())
    drawn(ax)
    assert [b.get_width() for b in ax.patches]==pytest.approx([100*(1-m[i].weight_mask.float().mean().item()) for i in (0, 2)]+[0], abs=1e-4)
    assert list(ax.lines[0].get_xdata())==pytest.approx([60, 60], abs=1e-4) and [t.get_text() for t in ax.get_yticklabels()]==['0', '2', '4'] and ax.get_title(loc='left')
    assert any('77 of 192' in t.get_text() for t in ax.texts) and any(t.get_text()=='dense' for t in ax.texts)
    assert plot_sparsity(learner(m), ax=ax) is ax

def test_masks():
    frames = [(k, torch.rand(9, 12)<.4) for k in range(0, 70, 10)]
    axs = show_masks(frames, n=3)
    drawn(axs[0])
    assert len(axs)==3 and [a.get_title() for a in axs]==['start', 'step 30', 'step 60']
    first,last = (np.asarray(axs[i].images[0].get_array()) for i in (0, -1))
    assert (first==frames[0][1].int().numpy()).all() and ((last>0)==frames[6][1].numpy()).all() and ((last==2)==(frames[6][1] & ~frames[3][1]).numpy()).all()
    conv = show_masks([(0, torch.ones(70, 3, 3, 3).bool())])
    assert len(conv)==1 and conv[0].images[0].get_array().shape==(60, 27)

HISTORY = [dict(step=10*i, churn=.3/i, drop=.3, explored=.1+.02*i, sparsity=.9) for i in range(1, 6)]
def test_churn():
    axs = plot_churn(HISTORY)
    drawn(axs[0])
    assert list(axs[0].lines[1].get_ydata())==pytest.approx([100*h['churn'] for h in HISTORY]) and list(axs[1].lines[0].get_ydata())==pytest.approx([100*h['explored'] for h in HISTORY])
    assert list(axs[1].lines[1].get_ydata())==pytest.approx([10]*5) and list(axs[0].lines[0].get_xdata())==[h['step'] for h in HISTORY]
    class Recorder: history = HISTORY
    assert len(plot_churn(Recorder(), axs=axs))==2
    with pytest.raises(ValueError, match='SparseRecorderCallback'): plot_churn([])

def test_weights():
    axs = plot_weights(m := model())
    drawn(axs[0])
    assert [sum(b.get_height() for b in ax.patches) for ax in axs]==nnz(m) and ['weight' in ax.get_title() for ax in axs]==[True, True]
    assert len(plot_weights(m, which='2'))==1 and '2.weight' in plot_weights(m, which='2')[0].get_title()
    with pytest.raises(ValueError, match='sparsify_model'): plot_weights(mlp(4, 3))

def test_inputs():
    ax = show_inputs(m := model())
    drawn(ax)
    assert (np.asarray(ax.images[0].get_array())==m[0].weight_mask.sum(0).view(4, 4).numpy()).all()
    assert show_inputs(m, shape=(2, 8)).images[0].get_array().shape==(2, 8) and show_inputs(m, which='2').images[0].get_array().shape==(1, 12)
    with pytest.raises(ValueError, match='16 inputs'): show_inputs(m, shape=(3, 5))
    with pytest.raises(ValueError, match='sparsify_model'): show_inputs(mlp(4, 3))
    assert len(ax.figure.axes)==2 and len(show_inputs(m, colorbar=False).figure.axes)==1

def test_inputs_of_a_convolution():
    for conv in (nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(3, 8, 5)):
        sparsify_model(conv, .5)
        counts = conv.weight_mask.sum((0,1)).numpy()
        assert (np.asarray(show_inputs(conv).images[0].get_array())==counts).all()

def test_start_and_end():
    frames = [(0, torch.rand(12, 16)<.2), (5, torch.rand(12, 16)<.5), (9, torch.rand(12, 16)<.5)]
    axs = show_start_end(frames)
    drawn(axs[0])
    assert [(np.asarray(ax.images[0].get_array())==m.sum(0).view(4, 4).numpy()).all() for ax,(_,m) in zip(axs, (frames[0], frames[-1]))]==[True, True]
    assert axs[0].images[0].get_clim()==axs[1].images[0].get_clim() and axs[1].get_title()=='after 9 steps'

RUNS = [dict(method=m, sparsity=s, flops=1-s, accuracy=.9-s/10-k/100, seed=k) for m in ('SET', 'RigL') for s in (.9, .95, .99) for k in (0, 2)] + [dict(method='dense', sparsity=0., flops=1., accuracy=.9)]
@pytest.mark.parametrize('x', ['sparsity', 'flops'])
def test_runs(x):
    ax = plot_runs(RUNS, x=x)
    drawn(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['dense', 'SET', 'RigL']
    line = ax.containers[0].lines[0]
    xs = [.9, .95, .99] if x=='sparsity' else [.01, .05, .1]
    ys = [100*(.9-s/10-.01) for s in ((.9, .95, .99) if x=='sparsity' else (.99, .95, .9))]
    assert list(line.get_xdata())==pytest.approx(xs) and list(line.get_ydata())==pytest.approx(ys)
    low,high = ax.containers[0].lines[2][0].get_segments()[0][:,1]
    assert (low,high)==pytest.approx((ys[0]-1, ys[0]+1))                                 # the lowest and the highest run
    assert ax.containers[0].lines[0].get_color()!=ax.containers[1].lines[0].get_color() and line.get_marker()!=ax.containers[1].lines[0].get_marker()

def test_runs_that_lack_something():
    with pytest.raises(ValueError, match="'flops'"): plot_runs([dict(method='a', sparsity=.9, accuracy=.8)], x='flops')
    with pytest.raises(ValueError, match="'speed'"): plot_runs(RUNS, x='speed')
    assert plot_runs(RUNS, y='flops', dense=None, ax=(ax := plt.subplots()[1])) is ax
