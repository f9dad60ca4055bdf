"""What the cells of Step2_EfficientNet_Model.ipynb call: EfficientNet trained on each variant, and compared.

The rooms in reading order; each imports only from those above it:

    variants     the variants of Step 1's table, and which pairs of them differ by one step
    classes      the classes of the training slices, and their order
    settings     every parameter with its limits, and the profiles
    files        files that are whole or not there, and the results folder, which one notebook uses at a time
    slices       Step 1's manifest: which slices there are, of which class and patient
    pictures     PNGs, augmentation, batches
    folds        which patients are held out together
    network      EfficientNet, its initial weights, its learning rate
    training     one training step, one epoch, one run from its first epoch to its last
    speed        precision, memory layout and compilation: measured on a GPU, fixed on a CPU
    runs         all runs of a comparison: their folders, what they leave behind, the tables made of them
    sessions     sessions that end before all runs are trained, and what is whole by then
    engine       who trains them: this process, a Dask cluster on this machine, or one elsewhere
    convergence  whether each variant trained to its end
    bootstrap    draws of whole patients
    estimates    a metric of every variant, and its two sources of noise: patients and trainings
    power        which differences a comparison would find, after training or before it
    pace         how fast a network trains and what it needs, timed or estimated
    plan         what a comparison costs and could find, before it is trained; python -m step2.plan
    check_gpu    what only a GPU can show, in a few minutes; python -m step2.check_gpu
    metrics      accuracy, sensitivity, AUC, calibration, from the held-out predictions
    statistics   paired differences between variants, intervals, p values, verdicts; which may be the best
    endpoints    the same for any hemorrhage against healthy
    costs        what a variant costs: milliseconds, minutes, kilobytes
    report       where tables and figures go, and what made them
    figures      every figure
    steps        one slice led through the steps
    explain      Grad-CAM
    summary      the answer in words
"""
