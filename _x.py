import gc, os, time, copy, pickle, io
import torch, torch.nn as nn, stabilitylab as sl, tempfile

R = tempfile.mkdtemp()


def hooks(m):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())


m = nn.Sequential(nn.Linear(8, 8))
mon = sl.attach(m, sites="0", run=R + "/L")
e = mon.edit()
e.__enter__()
del e, mon
gc.collect()
print("hooks", hooks(m))
r = sl.load(R + "/L")
print([(x.edit, x.status, x.row.error) for x in r.edits], r.complete)
m = nn.Sequential(nn.Linear(8, 8))
mon = sl.attach(m, sites="0", run=R + "/F")
with mon.edit():
    m[0].weight.data += 1
pid = os.fork()
if pid == 0:
    with mon.edit():
        m[0].weight.data += 1
    mon.close()
    os._exit(0)
os.waitpid(pid, 0)
with mon.edit():
    m[0].weight.data += 1
mon.close()
r = sl.load(R + "/F")
print([(x.edit, x.status) for x in r.edits], r.complete, r.series("update.norm", "0"))
