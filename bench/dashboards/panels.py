"""What all dashboards have in common: where the data comes from, and three kinds of panels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from grafana_foundation_sdk.builders import common, stat, table, text, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    Panel,
    Threshold,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG = "weighbridge"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
AGENT = 'job="weighbridge-agent",instance=~"$instance"'
COLLECTOR = 'job="weighbridge-collector",instance=~"$instance"'
WIDTH = 24

Query = tuple[str, str]
"""(expression, legend)."""
Panels = tuple[Builder[Panel], ...]


def dashboard(
    title: str, about: str, variables: dict[str, str], *rows: tuple[str, Sequence[Builder[Panel]]]
) -> Dashboard:
    """`variables`: name -> the series whose label of that name has the values to choose from. `rows`: (title, panels)."""
    name = title.lower()
    made = (
        Dashboard(f"Weighbridge: {name}")
        .uid(f"weighbridge-{name.replace(' ', '-')}")
        .description(about)
        .tags([TAG])
        .editable()
        .time("now-6h", "now")
        .refresh("1m")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
        .link(DashboardLink("Weighbridge").type(DashboardLinkType.DASHBOARDS).tags([TAG]).keep_time(True))
    )
    for label, series in variables.items():
        made.with_variable(
            QueryVariable(label)
            .query(f"label_values({series}, {label})")
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text="All", value="$__all"))
        )
    numbers = count(1)
    for row_title, panels in rows:
        made.with_row(Row(row_title).id(next(numbers)))
        for panel in panels:
            made.with_panel(panel.id(next(numbers)))  # type: ignore[attr-defined] # of each kind of panel, not of Builder
    return made


def graph(
    title: str, about: str, unit: str, *queries: Query, wide: int = 8, stacked: bool = False
) -> Builder[Panel]:
    """Lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(wide)
        .height(8)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .targets([_query(query, number) for number, query in enumerate(queries)])
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    return panel


def number(
    title: str, about: str, unit: str, expression: str, bad_above: float | None = None
) -> Builder[Panel]:
    """One figure; red above `bad_above`."""
    steps = [Threshold(value=None, color="green")]
    if bad_above is not None:
        steps.append(Threshold(value=bad_above, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .span(4)
        .height(4)
        .color_mode(BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(ThresholdsConfig().steps(steps))
        .targets([_query((expression, ""), 0).instant()])
    )


def listing(title: str, about: str, expression: str, unit: str = "short", wide: int = 12) -> Builder[Panel]:
    """A line for each series now."""
    return (
        table.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .span(wide)
        .height(8)
        .targets([_query((expression, ""), 0).instant().format(PromQueryFormat.TABLE)])
        .with_transformation(
            DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True, "job": True}})
        )
    )


def note(title: str, markdown: str) -> Builder[Panel]:
    """Words over the whole width."""
    return text.Panel().title(title).content(markdown).span(WIDTH).height(4)


def _query(query: Query, number: int) -> Dataquery:
    expression, legend = query
    return Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
