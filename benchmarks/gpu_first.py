import sys, time, json, os, dataclasses, itertools
import torch, triton
from torch.nn import functional as F
from benchmarks.cuda_timing import captured, medians
from lorafx.kernels import ops, sgmv
from lorafx.kernels import schedule as sched
D="cuda"
def group(k, widths, ranks, rows, tokens, L, dtype=torch.bfloat16, adtype=None, pairs=4, adapters=None):
    torch.manual_seed(0)
    adtype=adtype or dtype
    n=len(widths); layers=[]
    caps=[sum(ranks)]*n
    for _ in range(L):
        W=[torch.randn(w,k,device=D,dtype=dtype)/k**.5 for w in widths]
        A=torch.randn(sum(caps),k,device=D,dtype=adtype)/k**.5
        B=[torch.randn(caps[0],w,device=D,dtype=adtype) for w in widths]
        layers.append((W,A,B))
    starts=[sum(ranks[:i]) for i in range(len(ranks))]
    windows=torch.tensor([[[starts[s],ranks[s],-1]]*n for s in range(len(ranks))],dtype=torch.int32,device=D)
    scale=torch.full((len(ranks),n),0.5,device=D)
    slots=torch.full((256,pairs),-1,dtype=torch.int32); weights=torch.zeros(256,pairs)
    for r in range(rows):
        slots[r,0]=adapters[r] if adapters else r%len(ranks); weights[r,0]=1.0
    count=torch.tensor(rows,device=D)
    x=torch.randn(rows,tokens,k,device=D,dtype=dtype)
    return layers,x,caps,slots.to(D),weights.to(D),count,scale,windows
def run(case, lora=True, base=True, ys0=None, n=None):
    layers,x,caps,slots,weights,count,scale,windows=case
    out=None
    for i,(W,A,B) in enumerate(layers[:n]):
        ys=[F.linear(x,w) for w in W] if base else ys0
        if lora: out=torch.ops.lorafx.sgmv(ys,x,[A],B,caps,slots,weights,count,scale,windows,[],[])
        else: out=ys
    return out
def check(case):
    layers,x,caps,slots,weights,count,scale,windows=case
    W,A,B=layers[0]
    ys=[F.linear(x,w) for w in W]
    outs=torch.ops.lorafx.sgmv(ys,x,[A],B,caps,slots,weights,count,scale,windows,[],[])
    worst=0
    for i,(y,o) in enumerate(zip(ys,outs)):
        for row in range(x.shape[0]):
            s=int(slots[row,0]); 
            if s<0:
                assert torch.equal(y[row],o[row]); continue
            st,r,_=windows[s,i].tolist()
            a=A[i*caps[0]+st:i*caps[0]+st+r].double(); b=B[i][st:st+r].double()
            d=0.5*(x[row].double()@a.T)@b
            exp=y[row].double()+d
            rnd=torch.finfo(y.dtype).eps/2*exp.norm()/d.norm()
            err=(o[row].double()-exp).norm()/d.norm()-rnd
            worst=max(worst,err.item())
    return worst
GROUPS={"qkv":(4096,(4096,1024,1024)),"o":(4096,(4096,)),"gateup":(4096,(14336,14336)),"down":(14336,(4096,))}
MIX=[4,8,8,16,16,32,64,64]
D_VAR=[{}]+[dict(block_k=b,split_k=s,shrink_warps=w) for b,s,w in [(256,16,2),(256,16,4),(512,8,2),(512,8,8),(1024,4,4),(1024,4,8),(512,4,4),(256,8,4)]]+[dict(block_n=n,expand_warps=w,expand_r=r) for n,w,r in [(64,1,16),(128,1,16),(256,1,16),(128,2,16),(256,2,16),(256,4,16),(64,1,64),(128,2,64),(128,4,64),(256,4,32)]]
P_VAR=[{}]+[dict(shrink_stages=s,block_k=b,shrink_warps=w) for s,b,w in [(3,64,4),(5,64,4),(4,128,4),(4,128,8),(3,128,4)]]+[dict(block_n=n,expand_warps=w,expand_r=r) for n,w,r in [(64,4,16),(128,4,16),(128,8,16),(256,4,16),(256,8,16),(128,4,64),(256,8,64),(64,4,64),(128,8,32),(256,8,32)]]+[dict(block_m=128,block_n=n,expand_warps=w,shrink_warps=sw) for n,w,sw in [(64,4,4),(128,8,8),(128,4,4)]]
JOBS=[]
for rows,ranks in [(1,[16]),(8,MIX),(64,[16]*8)]:
    for g in ["qkv","gateup","down"]:
        JOBS+= [(g,rows,1,tuple(ranks),v) for v in D_VAR]
for rows,tokens,ranks in [(1,512,[16]),(8,512,MIX)]:
    for g in ["qkv","gateup","down"]:
        JOBS+= [(g,rows,tokens,tuple(ranks),v) for v in P_VAR]
real=sched.schedule
def use(v):
    def planned(rows,tokens,k,*a,**kw):
        plan=dataclasses.replace(real(rows,tokens,k,*a,**kw),**v)
        return dataclasses.replace(plan, chunk=sched._chunk(k,plan.split_k,plan.block_k), block_n=min(plan.block_n, sched.power_of_two(max(a[0]))))
    sgmv.schedule=planned
def main():
    if sys.argv[1]=="compile":
        i,n=int(sys.argv[2]),int(sys.argv[3])
        for g,rows,tokens,ranks,v in JOBS[i::n]:
            try: use(v); check(group(*GROUPS[g],list(ranks),rows,tokens,1))
            except Exception as e: print("FAIL",g,rows,tokens,v,repr(e)[:300],flush=True)
        return
    only=sys.argv[2] if len(sys.argv)>2 else None
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    t0=time.time()
    for (g,rows,tokens,ranks),jobs in itertools.groupby(JOBS,key=lambda j:j[:4]):
        L=8 if tokens==1 else 4
        case=group(*GROUPS[g],list(ranks),rows,tokens,L)
        graphs={"base":captured(lambda: run(case,False)).replay}
        errs={}; keep=[]
        for *_,v in jobs:
            try:
                use(v); errs[str(v)]=check(case); gr=captured(lambda: run(case)); keep.append(gr); graphs[str(v)]=gr.replay
            except Exception as e: print("FAIL",g,rows,tokens,v,repr(e)[:200],flush=True)
        m={k:t*1e3/L for k,t in medians(graphs,20).items()}
        print(f"== {g} {rows}x{tokens} {len(ranks)} adapters: base {m['base']:.2f} us   [{time.time()-t0:.0f}s]",flush=True)
        for k,t in m.items():
            if k!="base": print(f"   +{t-m['base']:7.2f} {k}  err {errs[k]:.1e}",flush=True)
        del case,graphs,keep
        torch.cuda.empty_cache()
main()
