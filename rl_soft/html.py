def page(report, evaluations, curves) -> str:
    return ""
