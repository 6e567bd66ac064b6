"""The tab "Stability" in TensorBoard, a dynamic plugin.

`loader` is what TensorBoard imports; `plugin` answers requests; `shelf` finds the runs under the logdir and reads them;
`payload` turns a run into what is sent; `static/` holds the page, plain ES modules without a build step.
"""
