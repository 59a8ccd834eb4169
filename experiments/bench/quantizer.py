"""The smoothed quantizer, and the nearest code, in PyTorch: what quantizer.lua times Vertex against.

    python3 quantizer.py BASELINE SAMPLER REGULARIZER N D M K THREADS INPUTS RESULT [DEVICE]
    python3 quantizer.py BASELINE nearest METRIC N D M K THREADS INPUTS RESULT [DEVICE]

A worker that quantizer.lua drives: it reads INPUTS (float64_check.c says what a file holds), prints "ready VERSION",
and then answers each line "run" with "FORWARD BACKWARD" in milliseconds, "save" by writing RESULT, "memory" with the
bytes that its peak resident size lies above what it was with the inputs loaded and the libraries warm. Out of memory:
it answers "oom".
With DEVICE cuda:0 all of it runs on that GPU, times include the wait for the last kernel, and memory is what torch's
allocator counts.

Baselines of the smoothed methods:
    naive    the paper written out: softmax, p @ codebook, topk over the rows, autograd
    trans    topk on a transposed, detached copy, whose rows are contiguous; only the survivors get gradients
    chunk    blocks of rows, running top-K, everything made again in a custom backward pass, where the KNN term is
             sparse; never an N x M array
    filter   the best eager code we know: chunk, where only keys that pass their code's K-th best so far are looked at
             further
    compile  naive under torch.compile
and of the nearest code:
    cdist    torch.cdist(z, codebook).argmin(1)
    mm       (|q|^2 - 2 z codebook^T).argmin(1)
    chunk    mm in blocks of rows that stay in cache
    vqp      vector-quantize-pytorch's VectorQuantize in eval mode: indices of a forward pass
"""
import math
import resource
import sys
import time

import torch
import torch.nn.functional as F

# Of a block of rows times all codes: the fastest of 2^18 .. 2^25 on two cores of an AMD EPYC. Whole blocks go through
# topk in chunk's forward pass, which likes them larger.
CHUNK_ELEMENTS, TOPK_ELEMENTS = 1 << 21, 1 << 23
GPU_CHUNK_ELEMENTS = 1 << 27  # half a gigabyte: few launches, and small beside a GPU's memory
DEVICE = torch.device(sys.argv[11] if len(sys.argv) > 11 else "cpu")


def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def gumbel(shape):
    return -torch.empty(shape).exponential_().log()


def weights(log_pi, sampler):
    """p of Eq. 5, 7 or 8 from log pi."""
    if sampler == "softmax":
        return log_pi.exp()
    return F.gumbel_softmax(log_pi, tau=1.0, hard=sampler == "hgumbel", dim=1)


def perplexity_loss(log_pi):
    mean = log_pi.exp().mean(0)
    return 1 - torch.exp(-(mean * mean.clamp_min(1e-30).log()).sum()) / mean.numel()


def log_softmax_logits(z, codebook, log_tau):
    logits = F.normalize(z, dim=1) @ F.normalize(codebook, dim=1).t() / log_tau.exp()
    return F.log_softmax(logits, 1)


def naive(z, codebook, log_tau, k, sampler, regularizer):
    log_pi = log_softmax_logits(z, codebook, log_tau)
    p = weights(log_pi, sampler)
    y = p @ codebook
    near, reg = None, y.new_zeros(())
    if regularizer == "knn-ce":
        values, near = log_pi.topk(k, dim=0)
        reg = -values.mean()
    elif regularizer == "knn-l2":
        pi = p if sampler == "softmax" else log_pi.exp()
        distance = (pi * pi).sum(1, keepdim=True) - 2 * pi
        values, near = distance.topk(k, dim=0, largest=False)
        reg = values.mean() + 1
    elif regularizer == "ppl":
        reg = perplexity_loss(log_pi)
    return y, reg, p, None if near is None else near.t()


def trans(z, codebook, log_tau, k, sampler, regularizer):
    log_pi = log_softmax_logits(z, codebook, log_tau)
    p = weights(log_pi, sampler)
    y = p @ codebook
    pi = p if sampler == "softmax" else log_pi.exp()
    with torch.no_grad():
        if regularizer == "knn-ce":
            key = log_pi.t().contiguous()
        else:
            key = (2 * pi - (pi * pi).sum(1, keepdim=True)).t().contiguous()
        near = key.topk(k, dim=1).indices
        del key
    code = torch.arange(codebook.shape[0])[:, None]
    if regularizer == "knn-ce":
        reg = -log_pi[near, code].mean()
    else:
        reg = ((pi * pi).sum(1)[near] - 2 * pi[near, code]).mean() + 1
    return y, reg, p, near


def merge_block(key, best, near, k, first):
    """K best keys and rows (M,K) of each code, after a block key (rows,M) whose first row is row `first`: topk of
    everything."""
    values, index = key.t().contiguous().topk(k, dim=1)
    index += first
    if best is None:
        return values, index
    values, index = torch.cat([best, values], 1), torch.cat([near, index], 1)
    best, order = values.topk(k, dim=1)
    return best, index.gather(1, order)


def merge_survivors(key, best, near, k, first):
    """The same, from the few keys that are better than the K-th best so far, padded to as many per code as any code
    has."""
    if best is None:
        return merge_block(key, best, near, k, first)
    row, code = (key > best[:, -1]).nonzero(as_tuple=True)
    if row.numel() == 0:
        return best, near
    found = key[row, code]
    code, order = code.sort(stable=True)
    count = torch.bincount(code, minlength=key.shape[1])
    place = k + torch.arange(code.numel()) - (count.cumsum(0) - count)[code]
    values = torch.full((key.shape[1], k + int(count.max())), -math.inf)
    index = torch.zeros_like(values, dtype=torch.long)
    values[:, :k], index[:, :k] = best, near
    values[code, place], index[code, place] = found[order], row[order] + first
    best, order = values.topk(k, dim=1)
    return best, index.gather(1, order)


class Chunked(torch.autograd.Function):
    """rows (N,D) = z / |z| / tau, hat (M,D) normalized codes, codebook as stored -> y, reg, near."""

    @staticmethod
    def forward(ctx, rows, hat, codebook, k, regularizer, merge):
        n, m = rows.shape[0], hat.shape[0]
        elements = TOPK_ELEMENTS if merge is merge_block else CHUNK_ELEMENTS
        blocks = max(1, n * m // elements)
        while blocks > 1 and n // blocks < k:  # topk needs K rows in each
            blocks -= 1
        knn = regularizer != "none"
        y, lse, squares = torch.empty(n, codebook.shape[1]), torch.empty(n), torch.empty(n)
        best = near = None
        for b in range(blocks):
            part = slice(n * b // blocks, n * (b + 1) // blocks)
            logits = rows[part] @ hat.t()
            lse[part] = torch.logsumexp(logits, 1)
            logits -= lse[part, None]
            if regularizer == "knn-ce":
                best, near = merge(logits, best, near, k, part.start)
            pi = logits.exp_()
            torch.mm(pi, codebook, out=y[part])
            if regularizer == "knn-l2":
                squares[part] = (pi * pi).sum(1)
                best, near = merge(pi.mul_(2).sub_(squares[part, None]), best, near, k, part.start)
        ctx.save_for_backward(rows, hat, codebook, y, lse, squares, near)
        ctx.step, ctx.k, ctx.regularizer = max(1, CHUNK_ELEMENTS // m), k, regularizer
        reg = y.new_zeros(()) if not knn else -best.mean() + (regularizer == "knn-l2")
        ctx.mark_non_differentiable(near) if knn else None
        return y, reg, near

    @staticmethod
    def backward(ctx, dy, dreg, _):
        rows, hat, codebook, y, lse, squares, near = ctx.saved_tensors
        n, m = rows.shape[0], hat.shape[0]
        drows, dhat, dcodebook = torch.empty_like(rows), torch.zeros_like(hat), torch.zeros_like(codebook)
        offset = (dy * y).sum(1)
        knn, l2 = ctx.regularizer != "none", ctx.regularizer == "knn-l2"
        if knn:
            scale = dreg / (m * ctx.k)
            code, row = torch.arange(m).repeat_interleave(ctx.k), near.reshape(-1)
            count = torch.bincount(row, minlength=n).float()
            if l2:
                pairs = ((rows[row] * hat[code]).sum(1) - lse[row]).exp()
                offset += 2 * scale * (count * squares - torch.zeros(n).index_add_(0, row, pairs))
                weight = -2 * scale * pairs
            else:
                offset -= scale * count
                weight = (-scale).expand(m * ctx.k)
        for i in range(0, n, ctx.step):
            part = slice(i, i + ctx.step)
            pi = (rows[part] @ hat.t()).sub_(lse[part, None]).exp_()
            dcodebook.addmm_(pi.t(), dy[part])
            x = dy[part] @ codebook.t()
            x -= offset[part, None]
            if l2:
                x.addcmul_(pi, (2 * scale * count[part])[:, None])
            x *= pi
            torch.mm(x, hat, out=drows[part])
            dhat.addmm_(x.t(), rows[part])
        if knn:
            drows.index_add_(0, row, weight[:, None] * hat[code])
            dhat.index_add_(0, code, weight[:, None] * rows[row])
        return drows, dhat, dcodebook, None, None, None


def chunk(z, codebook, log_tau, k, sampler, regularizer, merge=merge_block):
    rows, hat = F.normalize(z, dim=1) / log_tau.exp(), F.normalize(codebook, dim=1)
    y, reg, near = Chunked.apply(rows, hat, codebook, k, regularizer, merge)
    return y, reg, None, near


def filtered(z, codebook, log_tau, k, sampler, regularizer):
    return chunk(z, codebook, log_tau, k, sampler, regularizer, merge_survivors)


def nearest_cdist(z, codebook, metric):
    if metric == "cosine":
        z, codebook = F.normalize(z, dim=1), F.normalize(codebook, dim=1)
    return torch.cdist(z, codebook).argmin(1)


def nearest_mm(z, codebook, metric):
    if metric == "cosine":
        return (z @ F.normalize(codebook, dim=1).t()).argmax(1)
    return torch.addmm(codebook.pow(2).sum(1), z, codebook.t(), alpha=-2).argmin(1)


def nearest_chunk(z, codebook, metric):
    step = max(1, CHUNK_ELEMENTS // codebook.shape[0])
    return torch.cat([nearest_mm(z[i:i + step], codebook, metric) for i in range(0, z.shape[0], step)])


def nearest_vqp(codebook, metric):
    from vector_quantize_pytorch import VectorQuantize
    quantizer = VectorQuantize(dim=codebook.shape[1], codebook_size=codebook.shape[0],
                               use_cosine_sim=metric == "cosine").eval()
    embed = F.normalize(codebook, dim=1) if metric == "cosine" else codebook
    quantizer._codebook.embed.data.copy_(embed[None])
    return lambda z, _codebook, _metric: quantizer(z[None])[1][0]


def make_step(baseline, sampler, regularizer, k):
    """step(z, codebook, log_tau, dy) -> (forward seconds, backward seconds, result for the file). Sampler "nearest":
    the nearest code, by the metric in the regularizer's place."""
    if sampler == "nearest":
        metric = regularizer
        nearest = {"cdist": nearest_cdist, "mm": nearest_mm, "chunk": nearest_chunk, "vqp": None}[baseline]

        @torch.no_grad()
        def step(z, codebook, log_tau, dy):
            nonlocal nearest
            nearest = nearest or nearest_vqp(codebook, metric)
            start = now()
            codes = nearest(z, codebook, metric)
            return now() - start, 0.0, [codes]

        return step
    quantize = {"naive": naive, "trans": trans, "chunk": chunk, "filter": filtered, "compile": naive}[baseline]
    if baseline == "compile":
        quantize = torch.compile(quantize)

    def step(z, codebook, log_tau, dy):
        for leaf in (z, codebook, log_tau):
            leaf.grad = None
        start = now()
        y, reg, p, near = quantize(z, codebook, log_tau, k, sampler, regularizer)
        middle = now()
        torch.autograd.backward([y, reg], [dy, torch.ones(())]) if regularizer != "none" else y.backward(dy)
        return middle - start, now() - middle, (y, reg, p, near)

    return step


def read_inputs(path, n, d, m):
    size = 2 * n * d + m * d + 1
    flat = torch.from_file(path, size=size, device="cpu").to(DEVICE, copy=True)
    z, codebook, dy, log_tau = flat.split([n * d, m * d, n * d, 1])
    z, codebook, dy = z.view(n, d).clone(), codebook.view(m, d).clone(), dy.view(n, d).clone()
    return z.requires_grad_(), codebook.requires_grad_(), dy, log_tau.clone().requires_grad_()


def write_result(path, z, codebook, log_tau, result):
    with open(path, "wb") as f:
        if len(result) == 1:
            f.write(result[0].to(torch.int32).cpu().numpy().tobytes())
            return
        y, reg, p, near = result
        for x in (y, z.grad, codebook.grad, log_tau.grad, reg):
            f.write(x.detach().reshape(-1).cpu().numpy().tobytes())
        if near is not None:
            f.write(near.to(torch.int32).contiguous().cpu().numpy().tobytes())
        codes = torch.zeros(z.shape[0], dtype=torch.int32) if p is None else p.argmax(1).to(torch.int32)
        f.write(codes.cpu().numpy().tobytes())


def peak():
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    baseline, sampler, regularizer = sys.argv[1:4]
    n, d, m, k, threads = map(int, sys.argv[4:9])
    inputs, result_path = sys.argv[9:11]
    torch.set_num_threads(threads)
    if DEVICE.type == "cuda":
        global CHUNK_ELEMENTS, TOPK_ELEMENTS
        CHUNK_ELEMENTS = TOPK_ELEMENTS = GPU_CHUNK_ELEMENTS
        torch.set_default_device(DEVICE)  # since PyTorch 2.0
    torch.manual_seed(1)
    small = [torch.randn(64, d).requires_grad_(), torch.randn(64, d).requires_grad_(),
             torch.tensor([0.1]).log().requires_grad_(), torch.randn(64, d)]
    make_step("naive" if baseline == "compile" else baseline, sampler, regularizer, 1)(*small)  # libraries warm
    z, codebook, dy, log_tau = read_inputs(inputs, n, d, m)
    step, base, result = make_step(baseline, sampler, regularizer, k), peak(), None
    print("ready", torch.__version__, flush=True)
    for line in sys.stdin:
        command = line.strip()
        try:
            if command == "run":
                result = None
                forward, backward, result = step(z, codebook, log_tau, dy)
                print(f"{forward * 1e3:.4f} {backward * 1e3:.4f}", flush=True)
            elif command == "save":
                write_result(result_path, z, codebook, log_tau, result)
                print("saved", flush=True)
            elif command == "memory":
                print(peak() - base, flush=True)
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            if "memory" not in text and not isinstance(error, MemoryError):
                raise
            print("oom", flush=True)
            return


main()
