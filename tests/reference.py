"""An independent reference: Python floats (float64), lists and loops, no tensors

Written from the published algorithms. Positions are flat indices, row by row."""
import math

# ------------------------------------------------------------ selection
def top_k(scores, k, among=None):
    "The `k` best positions of `among`; ties go to the lower index, NaN is last"
    rank = lambda i: (math.isnan(scores[i]), 0. if math.isnan(scores[i]) else -scores[i], i)
    return set(sorted(range(len(scores)) if among is None else among, key=rank)[:k])

def drop_grow(mask, keep_score, grow_score, n_drop, n_grow):
    "The new mask as a list of bools"
    active = [i for i,m in enumerate(mask) if m]
    kept   = top_k(keep_score, len(active)-n_drop, active)
    grown  = top_k(grow_score, n_grow, [i for i in range(len(mask)) if i not in kept])
    return [i in kept or i in grown for i in range(len(mask))]

def f_decay(pos, start, end=0.): return end + (start-end)/2*(1+math.cos(math.pi*pos))

# ------------------------------------------------------------ optimizer state of grown weights
def second_moment(v, stays, born, grad=None, power=2):
    "What an update leaves of a second moment: new weights start with the mean of those that stay, times a power of their excess gradient"
    n = max(sum(stays), 1)
    mean = sum(x for x,s in zip(v, stays) if s)/n
    rms = 0. if grad is None else math.sqrt(sum(g*g for g,s in zip(grad, stays) if s)/n)
    excess = lambda i: min(max(1., abs(grad[i])/rms), 100.) if rms else 1.
    return [v[i] if stays[i] else mean*excess(i)**power if born[i] else 0. for i in range(len(v))]

# ------------------------------------------------------------ distributions
def erk(shapes, S, kernel=True, power=1.):
    numel = [math.prod(s) for s in shapes]
    raw   = [(sum(s)/math.prod(s))**power if kernel else (s[0]+s[1])/(s[0]*s[1]) for s in shapes]
    zeros = [math.floor(S*n) for n in numel]
    dense = set()
    while len(dense)<len(shapes):
        sparse = [l for l in range(len(shapes)) if l not in dense]
        eps = (sum(numel[l]-zeros[l] for l in sparse) - sum(zeros[l] for l in dense))/sum(raw[l]*numel[l] for l in sparse)
        worst = max(raw[l] for l in sparse)
        if eps*worst<=1: return [0. if l in dense else 1-eps*raw[l] for l in range(len(shapes))]
        dense |= {l for l in sparse if raw[l]==worst}
    return [0.]*len(shapes)

# ------------------------------------------------------------ redistribution
def snfs_growth(importance, nnz, numel, n_drop):
    "The official procedure pass by pass, with shares floored instead of rounded up, and the left over weights handed out one by one"
    L,total = len(nnz),sum(n_drop)
    room = [numel[l]-nnz[l]+n_drop[l] for l in range(L)]
    cap  = [0.99*r for r in room]
    grow = [v/sum(importance)*total for v in importance]
    mean_residual = 0.
    for _ in range(5000):
        residual = 0.
        for l in range(L):
            grow[l] += mean_residual
            if grow[l]>cap[l]: residual,grow[l] = residual+grow[l]-cap[l],cap[l]
        if residual<=0: break
        mean_residual = residual/L
    grow = [math.floor(g+1e-6) for g in grow]                        # the passes converge from below
    for limit in (cap, room):
        handed_out = True
        while sum(grow)<total and handed_out:
            handed_out = False
            for l in range(L):
                if sum(grow)<total and grow[l]+1<=limit[l]: grow[l],handed_out = grow[l]+1,True
    return grow

# ------------------------------------------------------------ a whole run
def train(method, weights, masks, biases, data, every, alpha, end, stop, lr, mom, wd, random_scores=None):
    """Two layers with a tanh between them, mean squared error, SGD with momentum, all by hand

    `weights` and `masks` are flat lists in the shapes (n_hid,n_in) and (n_out,n_hid). Returns the masks after each update, weights, biases and momenta"""
    W,M,B = [list(w) for w in weights],[list(m) for m in masks],[list(b) for b in biases]
    VW,VB = [[0.]*len(w) for w in W],[[0.]*len(b) for b in B]
    total,history = len(data),[]
    for step,(X,Y) in enumerate(data, 1):
        pct = (step-1)/total
        GW,GB = gradients(W, B, X, Y)
        due = step%every==0 and pct<stop and step!=total
        frac = f_decay(min(pct/stop, 1.), alpha, end)
        if not (due and method=='RigL'):
            for l in range(2):
                for i in range(len(W[l])):
                    g = GW[l][i] if method=='SNFS' or M[l][i] else 0.
                    VW[l][i] = mom*VW[l][i] + g + wd*W[l][i]
                    W[l][i] = W[l][i]-lr*VW[l][i] if M[l][i] else 0.
                for i in range(len(B[l])):
                    VB[l][i] = mom*VB[l][i] + GB[l][i] + wd*B[l][i]
                    B[l][i] -= lr*VB[l][i]
        if not due: continue
        nnz    = [sum(m) for m in M]
        n_drop = n_grow = [int(frac*n) for n in nnz]
        if method=='SNFS':
            means  = [sum(abs(v) for v,m in zip(VW[l], M[l]) if m)/nnz[l] for l in range(2)]
            n_grow = snfs_growth(means, nnz, [len(m) for m in M], n_drop)
        for l in range(2):
            grow = {'RigL': GW, 'SNFS': VW}[method][l] if method!='SET' else random_scores(step, l)
            new  = drop_grow(M[l], [abs(w) for w in W[l]], [abs(s) for s in grow], n_drop[l], n_grow[l])
            for i in range(len(new)):
                if not (new[i] and M[l][i]): W[l][i] = 0.
                if (new[i] and not M[l][i]) or (method!='SNFS' and not new[i]): VW[l][i] = 0.
            M[l] = new
        history.append([list(m) for m in M])
    return history,W,B,VW,VB

def gradients(W, B, X, Y):
    "Of the mean squared error"
    n_hid,n_out,n_in = len(B[0]),len(B[1]),len(X[0])
    GW,GB = [[0.]*len(w) for w in W],[[0.]*len(b) for b in B]
    for x,y in zip(X, Y):
        h = [math.tanh(B[0][j] + sum(W[0][j*n_in+i]*x[i] for i in range(n_in))) for j in range(n_hid)]
        o = [B[1][k] + sum(W[1][k*n_hid+j]*h[j] for j in range(n_hid)) for k in range(n_out)]
        d = [2*(o[k]-y[k])/(n_out*len(X)) for k in range(n_out)]
        for k in range(n_out):
            GB[1][k] += d[k]
            for j in range(n_hid): GW[1][k*n_hid+j] += d[k]*h[j]
        for j in range(n_hid):
            e = (1-h[j]**2)*sum(d[k]*W[1][k*n_hid+j] for k in range(n_out))
            GB[0][j] += e
            for i in range(n_in): GW[0][j*n_in+i] += e*x[i]
    return GW,GB
