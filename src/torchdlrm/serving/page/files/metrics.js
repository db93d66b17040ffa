// How good predictions are, exactly: every row counts once, ties count half. As torchdlrm/metrics.py has it.

/** Area under the ROC curve; NaN when the labels hold one class only. */
export function auc(labels, predictions) {
  const order = ascending(predictions);
  let positives = 0, rankSum = 0;
  for (let start = 0; start < order.length; ) {
    let end = start, clicked = 0;
    while (end < order.length && predictions[order[end]] === predictions[order[start]]) clicked += labels[order[end++]];
    rankSum += clicked * (start + end + 1) / 2; // ranks start + 1 ... end, shared by all that are equal
    positives += clicked;
    start = end;
  }
  return (rankSum - positives * (positives + 1) / 2) / (positives * (order.length - positives));
}

/** Mean negative log-likelihood in nats. A sure prediction that is wrong costs 36, not infinity. */
export function logloss(labels, predictions) {
  const least = 2 ** -52;
  let sum = 0;
  labels.forEach((label, i) => {
    const right = label === 1 ? predictions[i] : 1 - predictions[i];
    sum -= Math.log(Math.min(Math.max(right, least), 1 - least));
  });
  return sum / labels.length;
}

/** Rows by rising prediction in at most ten bins of equal size, with a 95 % interval (Wilson) of the click rate. */
export function calibrationBins(labels, predictions) {
  const order = ascending(predictions);
  const numBins = Math.max(1, Math.min(10, Math.floor(order.length / 5)));
  return Array.from({ length: numBins }, (_, bin) => {
    const members = order.slice(
      Math.floor(bin * order.length / numBins), Math.floor((bin + 1) * order.length / numBins));
    const rows = members.length;
    const clicks = members.reduce((sum, i) => sum + labels[i], 0);
    const predicted = members.reduce((sum, i) => sum + predictions[i], 0) / rows;
    const observed = clicks / rows, z = 1.96, z2 = z * z / rows;
    const middle = (observed + z2 / 2) / (1 + z2);
    const half = z * Math.sqrt(observed * (1 - observed) / rows + z2 / (4 * rows)) / (1 + z2);
    return { rows, clicks, predicted, observed, low: Math.max(0, middle - half), high: Math.min(1, middle + half) };
  });
}

/** The mean of numbers. */
export function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function ascending(values) {
  return Uint32Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
}
