// Draws every figure from the JSON beside it, in the colours of the page, and again when the scheme or the width changes.
(() => {
  const NARROW = 560;
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // A colour written as "var(--ink)" in a figure is the page's own.
  const resolve = (value) => {
    if (typeof value === "string") return value.startsWith("var(") ? css(value.slice(4, -1)) : value;
    if (Array.isArray(value)) return value.map(resolve);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item)]));
    return value;
  };
  const themed = (source, width) => {
    const narrow = width < NARROW;
    const figure = resolve(source);
    const layout = figure.layout;
    layout.font = { family: css("--sans"), size: narrow ? 11 : 13, color: css("--ink") };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.hoverlabel = { align: "left", bgcolor: css("--card"), bordercolor: css("--muted"), font: { color: css("--ink"), family: css("--sans"), size: 12 } };
    layout.autosize = false;  // plotly's own resizing forgets the height, and the figure then lies over its caption
    layout.width = width;
    layout.height ||= 400;
    const hide = (layout.meta || {}).narrow_hides || [];
    if (narrow) {
      layout.dragmode = false;  // A finger that scrolls the page must not zoom the figure.
      layout.height = Math.round(layout.height * ((layout.meta || {}).narrow_height || 1));
      layout.annotations = (layout.annotations || []).filter((item) => !hide.includes(item.name));
    }
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      Object.assign(layout[key], { linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true });
      layout[key].gridcolor = css("--line");
      const title = layout[key].title;
      if (title && title.text) Object.assign(title, { standoff: 8, font: { size: narrow ? 11 : 12, color: css("--muted") } });
    }
    for (const trace of figure.data) {
      if (narrow && trace.meta && trace.meta.narrow_text) trace.text = trace.meta.narrow_text;
    }
    return figure;
  };
  const draw = (element) => {
    const source = JSON.parse(document.getElementById(element.dataset.figure).textContent);
    const figure = themed(source, element.clientWidth);
    element.dataset.width = element.clientWidth;
    return Plotly.react(element, figure.data, figure.layout, { displaylogo: false, displayModeBar: false });
  };
  const all = [...document.querySelectorAll(".plot[data-figure]")];
  const drawAll = () => Promise.all(all.map(draw)).then(() => { document.documentElement.dataset.drawn = all.length; });
  // The library lies in the page packed, which makes the page less than half as large.
  const unpack = async () => {
    const packed = atob(document.getElementById("plotly").textContent.trim());
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const gzip = new DecompressionStream("gzip"), writer = gzip.writable.getWriter();
    writer.write(bytes);
    writer.close();
    const script = document.createElement("script");
    script.textContent = await new Response(gzip.readable).text();
    document.head.append(script);
  };
  const failed = (error) => all.forEach((e) => { e.textContent = `This browser can not draw the figure (${error.message}); one of 2023 or later can.`; });
  unpack().then(drawAll).catch(failed);
  scheme.addEventListener("change", () => window.Plotly && drawAll());
  let waiting = 0;
  const redraw = () => all.filter((e) => String(e.clientWidth) !== e.dataset.width).forEach(draw);
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => window.Plotly && redraw(), 50); });
  window.addEventListener("beforeprint", () => window.Plotly && redraw());
})();
