"Pictures show what they should: lengths, counts, positions; they draw where they are told, and refuse what they cannot draw"
import warnings
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from torch import nn
from sparsefast.all import *
from sparsefast.see.plots import *
from helpers import *

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

def test_sparsity_of_a_compiled_model_has_the_names_of_the_model(): assert [t.get_text() for t in plot_sparsity(torch.compile(model())).get_yticklabels()]==['0', '2', '4']

@pytest.mark.parametrize('f', [plot_sparsity, plot_weights, show_inputs])
def test_what_is_no_model_is_refused(f):
    with pytest.raises(TypeError, match='Learner, got 3'): f(3)

def test_sparsity_of_nothing():
    with pytest.raises(ValueError, match='must have a layer.*ReLU'): plot_sparsity(nn.ReLU())
    assert not plt.get_fignums()

def test_masks():
    frames = [(k, torch.rand(9, 12)<.4) for k in range(0, 70, 10)]
    axs = show_masks(frames, n=3)
    drawn(axs[0])
    assert len(axs)==3 and [a.get_title() for a in axs]==['start', 'step 30', 'step 60']
    first,last = (np.asarray(axs[i].images[0].get_array()) for i in (0, -1))
    assert (first==frames[0][1].int().numpy()).all() and ((last>0)==frames[6][1].numpy()).all() and ((last==2)==(frames[6][1] & ~frames[3][1]).numpy()).all()
    conv = show_masks([(0, torch.ones(70, 3, 3, 3).bool())])
    assert len(conv)==1 and conv[0].images[0].get_array().shape==(60, 27)

def inches(axs): return tuple(axs[0].figure.get_size_inches())

@pytest.mark.parametrize('shape', [(300, 4), (128, 10), (64, 3, 3, 3), (2, 784), (300, 784), (1, 1), (30,)], ids=str)
def test_masks_of_any_shape_have_a_reasonable_size(shape):
    axs = show_masks([(k, torch.rand(shape)<.4) for k in range(4)])
    drawn(axs[0])
    assert inches(axs)[0]==9.2 and 2<=inches(axs)[1]<=10
    boxes = [ax.get_tightbbox() for ax in axs]
    assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])                       # titles and labels included
    assert all(ax.get_window_extent().height>50 and box.y1<=axs[0].figure.bbox.y1+1 for ax,box in zip(axs, boxes))
    assert all(float(t).is_integer() for ax in axs for t in (*ax.get_xticks(), *ax.get_yticks()))

def test_weights_are_square_where_they_can_be():
    axs = show_masks([(k, torch.rand(60, 120)<.4) for k in range(4)])
    drawn(axs[0])
    box = axs[0].get_window_extent()
    assert (box.width/120)/(box.height/60)==pytest.approx(1, abs=.1)

def test_masks_say_how_much_of_a_layer_is_shown():
    ax = show_masks([(0, torch.rand(300, 784)<.1)])[0]
    assert (ax.get_xlabel(), ax.get_ylabel())==('120 of 784 inputs', '60 of 300 outputs')
    ax = show_masks([(0, torch.rand(16, 3, 3, 3)<.1)])[0]
    assert (ax.get_xlabel(), ax.get_ylabel())==('inputs x places in the kernel', 'outputs')

def test_masks_take_as_many_axes_as_there_are():
    frames = [(k, torch.rand(9, 12)<.4) for k in range(0, 70, 10)]
    axs = show_masks(iter(frames), axs=plt.subplots(1, 3)[1])
    assert [ax.get_title() for ax in axs]==['start', 'step 30', 'step 60'] and len(show_masks(frames[:2], axs=axs))==2

@pytest.mark.parametrize('f', [show_masks, show_start_end])
def test_frames_that_cannot_be_drawn(f):
    m = torch.rand(4, 9)<.5
    for bad,error,why in (([], ValueError, 'no masks.*keep='), (3, TypeError, r'recorder.masks\(\).*got 3'), (m, TypeError, 'recorder.masks'), ([(0, m.float())], ValueError, 'float32.*4, 9'), ([(0, 'x')], ValueError, "'x'"),
                          ([(0, m[:,:0])], ValueError, r'4, 0'), ([(0, m), (1, m[:2])], ValueError, r'4, 9.*2, 9')):
        with pytest.raises(error, match=why): f(bad)
    assert not plt.get_fignums()

def test_numbers_of_masks_that_cannot_be_drawn():
    frames = [(0, torch.rand(9, 12)<.4)]
    for bad in (dict(n=0), dict(n=2.5), dict(rows=0), dict(cols=-1)):
        k,v = next(iter(bad.items()))
        with pytest.raises(ValueError, match=f'{k} must be a whole number.*{v}'): show_masks(frames, **bad)
    with pytest.raises(ValueError, match='n must'): show_masks(frames, axs=[])

HISTORY = [dict(step=10*i, churn=.3/i, drop=.3, explored=.1+.02*i, sparsity=.9) for i in range(1, 6)]
def test_churn():
    axs = plot_churn(HISTORY)
    drawn(axs[0])
    assert list(axs[0].lines[1].get_ydata())==pytest.approx([100*h['churn'] for h in HISTORY]) and list(axs[1].lines[0].get_ydata())==pytest.approx([100*h['explored'] for h in HISTORY])
    assert list(axs[1].lines[1].get_ydata())==pytest.approx([10]*5) and list(axs[0].lines[0].get_xdata())==[h['step'] for h in HISTORY]
    class Recorder: history = HISTORY
    assert len(plot_churn(Recorder(), axs=axs))==2
    with pytest.raises(ValueError, match='SparseRecorderCallback'): plot_churn([])
    for bad in (3, learner()):
        with pytest.raises(TypeError, match='its `history`'): plot_churn(bad)
    with pytest.raises(ValueError, match='axs must be at least 2.*got 1'): plot_churn(HISTORY, axs=plt.subplots()[1])

def test_churn_leaves_a_gap_between_fits():
    h = [dict(r, fit=int(i>1)) for i,r in enumerate(HISTORY)]
    for line in (l for ax in plot_churn(h) for l in ax.lines):
        x,y = line.get_xdata(),line.get_ydata()
        assert len(x)==6 and np.isnan(x[2]) and np.isnan(y[2]) and list(np.delete(x, 2))==[10, 20, 30, 40, 50] and not np.isnan(np.delete(y, 2)).any()

@pytest.mark.parametrize('churn', [.3, 0.])
def test_the_legend_of_churn_lies_on_no_line(churn):
    h = [dict(step=10*i, churn=churn, drop=churn, explored=1., sparsity=.1) for i in range(1, 30)]
    axs = plot_churn(h)
    drawn(axs[0])
    for ax in axs:
        box = ax.get_legend().get_window_extent()
        assert all(ax.transData.transform((0, y))[1]<box.y0 for line in ax.lines for y in line.get_ydata())
    assert not any('12' in t.get_text() for t in axs[1].get_yticklabels())                             # nothing is 125 %

def test_weights():
    axs = plot_weights(m := model())
    drawn(axs[0])
    assert [sum(b.get_height() for b in ax.patches) for ax in axs]==nnz(m) and ['weight' in ax.get_title() for ax in axs]==[True, True]
    assert len(plot_weights(m, which='2'))==1 and '2.weight' in plot_weights(m, which='2')[0].get_title()
    with pytest.raises(ValueError, match='sparsify_model'): plot_weights(mlp(4, 3))
    with pytest.raises(ValueError, match='axs must be at least 2.*got 1'): plot_weights(m, axs=plt.subplots()[1])

def test_weights_that_are_not_finite():
    with torch.no_grad(): (m := model())[0].weight[tuple(m[0].weight_mask.nonzero()[0])] = float('inf')
    ax = plot_weights(m)[0]
    assert sum(b.get_height() for b in ax.patches)==nnz(m)[0]-1 and '1 not finite' in ax.get_title()

def test_inputs():
    ax = show_inputs(m := model())
    drawn(ax)
    assert (np.asarray(ax.images[0].get_array())==m[0].weight_mask.sum(0).view(4, 4).numpy()).all()
    assert show_inputs(m, shape=(2, 8)).images[0].get_array().shape==(2, 8) and show_inputs(m, which='2').images[0].get_array().shape==(1, 12)
    with pytest.raises(ValueError, match='16 inputs'): show_inputs(m, shape=(3, 5))
    with pytest.raises(ValueError, match='sparsify_model'): show_inputs(mlp(4, 3))
    assert len(ax.figure.axes)==2 and len(show_inputs(m, colorbar=False).figure.axes)==1
    for bad in (torch.rand(4, 9), torch.rand(9)<.5, m[0].weight_mask[:,:0]):
        with pytest.raises(ValueError, match='mask'): show_inputs(bad)
    with pytest.raises(ValueError, match='28 pixels'): show_inputs(m, shape=28)

@pytest.mark.parametrize('shape', [(8, 9), (8, 13), (8, 784), (8, 1)], ids=str)
def test_ticks_of_inputs_are_places(shape):
    drawn(ax := show_inputs(torch.rand(shape)<.5))
    low,high = zip(ax.get_xlim(), sorted(ax.get_ylim()))
    for ticks,lo,hi in zip((ax.get_xticks(), ax.get_yticks()), low, high):
        assert all(float(t).is_integer() for t in ticks) and any(lo<=t<=hi for t in ticks)

def test_no_input_at_all_is_a_dark_picture():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        drawn(ax := show_inputs(torch.zeros(8, 9).bool()))
    assert ax.images[0].get_clim()==(0, 1)

def test_pictures_of_more_dimensions_lie_side_by_side():
    mask = torch.rand(6, 3*4*5)<.5
    ax = show_inputs(mask, shape=(3, 4, 5))
    assert (np.asarray(ax.images[0].get_array())==np.hstack(mask.sum(0).view(3, 4, 5).numpy())).all() and '3 images' in ax.get_xlabel() and ax.get_title()=='Connections of each input'

def test_inputs_of_a_convolution():
    for conv in (nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(3, 8, 5)):
        sparsify_model(conv, .5)
        counts = conv.weight_mask.sum((0,1)).numpy()
        assert (np.asarray((ax := show_inputs(conv)).images[0].get_array())==counts).all() and ax.get_title()=='Connections of each place of the kernel'

def test_inputs_of_a_bilinear_layer_are_pairs():
    sparsify_model(m := nn.Bilinear(4, 5, 6), .5)
    ax = show_inputs(m)
    assert (np.asarray(ax.images[0].get_array())==m.weight_mask.sum(0).numpy()).all() and 'pair of inputs' in ax.get_title()

def test_start_and_end():
    frames = [(0, torch.rand(12, 16)<.2), (5, torch.rand(12, 16)<.5), (9, torch.rand(12, 16)<.5)]
    axs = show_start_end(frames)
    drawn(axs[0])
    assert [(np.asarray(ax.images[0].get_array())==m.sum(0).view(4, 4).numpy()).all() for ax,(_,m) in zip(axs, (frames[0], frames[-1]))]==[True, True]
    assert axs[0].images[0].get_clim()==axs[1].images[0].get_clim() and axs[1].get_title()=='after 9 steps'
    with pytest.raises(ValueError, match='axs must be at least 2.*got 1'): show_start_end(frames, axs=axs[:1])

def test_start_and_end_of_a_convolution():
    frames = [(0, torch.rand(8, 3, 5, 5)<.2), (9, torch.rand(8, 3, 5, 5)<.6)]
    axs = show_start_end(frames)
    assert axs[0].images[0].get_clim()[1]==frames[1][1].sum((0,1)).max() and 'kernel' in axs[0].figure.get_suptitle()

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

def labels(ax): return [t for t in ax.get_xticklabels() if t.get_text() and ax.get_window_extent().x0-1<=ax.transData.transform((t.get_position()[0], 0))[0]<=ax.get_window_extent().x1+1]

@pytest.mark.parametrize('dense', [True, False])
@pytest.mark.parametrize('sparsities', [(.5, .8, .9, .98), (0., .5, .9), (.8, .9, .95, .98, .99, .995), [.5+.49*i/30 for i in range(31)], (.9,), (.9, .9001, .99)], ids=len)
def test_sparsities_fill_the_axis_and_can_be_read(sparsities, dense):
    ax = plot_runs([dict(method='a', sparsity=s, accuracy=.9) for s in sparsities] + [dict(method='dense', sparsity=0., accuracy=.9)]*dense)
    drawn(ax)
    box,at = ax.get_window_extent(),[ax.transData.transform((s, .9))[0] for s in sparsities]
    if len(sparsities)>1: assert at[0]-box.x0<.1*box.width and box.x1-at[-1]<.1*box.width
    texts = [t.get_window_extent() for t in labels(ax)]
    assert texts and not any(a.overlaps(b) for i,a in enumerate(texts) for b in texts[:i])
    assert f'{100*sparsities[-1]:.5g}%' in [t.get_text() for t in labels(ax)]

def test_labels_of_a_small_picture():
    axs = plt.subplots(1, 3, figsize=(12, 3), layout='constrained')[1]
    for ax in axs: plot_runs([dict(method='a', sparsity=s, accuracy=.9) for s in (.5, .6, .7, .8, .85, .9, .95, .98, .99, .995)], ax=ax)
    drawn(axs[0])
    for ax in axs:
        texts = [t.get_window_extent() for t in labels(ax)]
        assert len(texts)>1 and not any(a.overlaps(b) for i,a in enumerate(texts) for b in texts[:i])

@pytest.mark.parametrize('costs', [(.11, .111, .112), (.1, .12, .19), (.01, .1, .9), (.13,)], ids=str)
def test_costs_can_be_read(costs):
    drawn(ax := plot_runs([dict(method=str(c), sparsity=.9, flops=c, accuracy=.9) for c in costs], x='flops'))
    texts = [t.get_window_extent() for t in labels(ax)]
    assert texts and not any(a.padded(5).overlaps(b) for i,a in enumerate(texts) for b in texts[:i])

@pytest.mark.parametrize('y,percent,shown', [('accuracy', None, 90), ('valid_loss', None, .9), ('error_rate', None, 90), ('top_k_accuracy', None, 90), ('accuracy', False, .9), ('f1', True, 90)])
def test_shares_are_in_percent_and_other_numbers_are_not(y, percent, shown):
    drawn(ax := plot_runs([{'method': 'a', 'sparsity': s, y: .9} for s in (.8, .9)] + [{'method': 'dense', 'sparsity': 0., y: .9}], y=y, percent=percent))
    assert [line.get_ydata()[0] for line in (ax.containers[0].lines[0], next(l for l in ax.lines if l.get_label()=='dense'))]==pytest.approx([shown, shown])
    assert all(t.get_text().endswith('%')==(shown==90) for t in ax.get_yticklabels()) and ax.get_ylabel()==y.replace('_', ' ')

def test_dense_alone_is_a_point():
    ax = plot_runs(RUNS[-1:])
    assert list(ax.containers[0].lines[0].get_xdata())==[0]

def test_runs_may_come_one_by_one():
    assert [t.get_text() for t in plot_runs(r for r in RUNS).get_legend().get_texts()]==['dense', 'SET', 'RigL']

@pytest.mark.parametrize('bad,error,why', [([], ValueError, 'runs must be dicts.*got none'), (['a'], TypeError, "dict, got 'a'"), ([dict(RUNS[0], accuracy=None)], TypeError, "'accuracy'.*None"), ([dict(RUNS[0], sparsity=90)], ValueError, 'below 1, got 90'),
                                           ([dict(RUNS[0], sparsity=1.)], ValueError, 'below 1, got 1.0')])
def test_runs_that_cannot_be_drawn(bad, error, why):
    with pytest.raises(error, match=why): plot_runs(bad)
    assert not plt.get_fignums()

def test_runs_that_cost_nothing_have_no_place():
    with pytest.raises(ValueError, match='above 0, got 0'): plot_runs([dict(RUNS[0], flops=0.)], x='flops')

def test_runs_that_lack_something():
    with pytest.raises(ValueError, match="'flops'"): plot_runs([dict(method='a', sparsity=.9, accuracy=.8)], x='flops')
    with pytest.raises(ValueError, match="'speed'"): plot_runs(RUNS, x='speed')
    assert plot_runs(RUNS, y='flops', dense=None, ax=(ax := plt.subplots()[1])) is ax
